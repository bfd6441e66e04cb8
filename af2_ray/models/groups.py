"""The groups of a model's parameters, which recipes name: what trains, and what a small part has of its own."""

from __future__ import annotations


def group_of(name: str) -> str:
    """The trainable group of a parameter name of `AudioFlamingo2ForConditionalGeneration` (config.Group), or `mel`.

    `mel`, the scale of the mel BatchNorm, is in no recipe and never trains: its gradient alone would go back through
    the image of the spectrogram (a sixth of the tower's time), for what the first convolution can learn as well.
    """
    if ".audio_encoder.batch_norm." in name:
        return "mel"
    if ".lora_" in name:
        return "lora"
    if name.startswith("audio_tower."):
        return "clap"
    if name.startswith("audio_transform."):
        return "transform"
    if name.startswith("added_embeddings"):
        return "tokens"
    return "xattn" if ".cross_attention." in name or name.startswith("prefix.") else "lm"
