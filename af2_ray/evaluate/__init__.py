"""Does it hear? Predictions, controls that cannot hear, metrics with intervals, retrieval and the report."""
