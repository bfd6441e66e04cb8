"""Audio Flamingo 2 as a Ray system: data, training, sweeps, evaluation and serving of an audio-language model."""

__version__ = "0.1.0"
