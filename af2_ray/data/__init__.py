"""From a manifest to batches: read, blend, plan, decode and collate, feed."""
