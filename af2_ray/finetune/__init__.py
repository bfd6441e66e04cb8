"""Fine-tuning of a model on somebody's own audio: data, recipe, scores before and after."""
