"""From clips and captions to what AF-CLAP takes, in the manner of transformers' `ClapProcessor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from transformers import (
    AutoFeatureExtractor,
    AutoProcessor,
    BatchFeature,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from af2_ray.audio.windows import SAMPLE_RATE, WINDOW_SAMPLES, ShortClips
from af2_ray.models.afclap import AfClapConfig
from af2_ray.models.processing_af2 import AudioFlamingo2FeatureExtractor, AudioInput


class AfClapFeatureExtractor(AudioFlamingo2FeatureExtractor):
    """Cuts clips into windows; of a clip longer than `max_windows` its beginning is heard.

    Args:
        short_clips: filling after the end of a clip of less than 10 s (`AfClapConfig.short_clips`).
    """

    def __init__(
        self,
        max_windows: int = 1,
        sampling_rate: int = SAMPLE_RATE,
        short_clips: ShortClips = "silence",
        **kwargs: Any,
    ) -> None:
        super().__init__(max_windows, sampling_rate, **kwargs)
        self.short_clips = short_clips

    def __call__(
        self,
        audio: Sequence[AudioInput],
        sampling_rate: int | None = None,
        *,
        truncate: bool = True,
        return_tensors: Literal["pt"] = "pt",
    ) -> BatchFeature:
        """`waveforms` int16 [S, 160000] and `windows_per_clip` [C] of C mono arrays [T] at 16 kHz, as torch tensors."""
        limit = self.max_windows * WINDOW_SAMPLES if truncate else None
        return super().__call__([clip[:limit] for clip in audio], sampling_rate)


class AfClapProcessor(ProcessorMixin):
    """Windows and tokens for `AfClapModel`.

    Args:
        text_length: tokens of a text at most.
        pad_to_length: whether texts are padded to `text_length` (the config's pooling `mean`), not to the longest.
    """

    def __init__(
        self,
        feature_extractor: AfClapFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        text_length: int = 77,
        pad_to_length: bool = False,
    ) -> None:
        self.text_length = text_length
        self.pad_to_length = pad_to_length
        super().__init__(feature_extractor, tokenizer)

    @classmethod
    def of(cls, config: AfClapConfig, tokenizer: PreTrainedTokenizerBase, max_windows: int = 1) -> AfClapProcessor:
        """The processor that belongs to a model."""
        extractor = AfClapFeatureExtractor(max_windows, short_clips=config.short_clips)
        return cls(extractor, tokenizer, config.text_length, config.text_pooling == "mean")

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: AudioInput | Sequence[AudioInput] | None = None,
        *,
        sampling_rate: int | None = None,
        return_tensors: Literal["pt"] | None = None,
        padding: bool = True,
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` [N, T] of captions, `waveforms` and `windows_per_clip` of clips, or both."""
        if text is None and audio is None:
            raise ValueError("give text, audio, or both")
        if return_tensors not in (None, "pt") or not padding:
            raise ValueError("texts are padded, and tensors are torch's: leave the others out")
        data: dict[str, Any] = {}
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            encoded = self.tokenizer(
                texts,
                padding="max_length" if self.pad_to_length else True,
                max_length=self.text_length,
                truncation=True,
                padding_side="right",
                return_tensors="pt",
            )
            data |= {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if audio is not None:
            clips = [audio] if isinstance(audio, np.ndarray) and audio.ndim == 1 else list(audio)
            data |= self.feature_extractor(clips, sampling_rate)
        return BatchFeature(data)

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes."""
        return ["input_ids", "attention_mask", "waveforms", "windows_per_clip"]


AutoFeatureExtractor.register(AfClapConfig, AfClapFeatureExtractor, exist_ok=True)
AutoProcessor.register(AfClapConfig, AfClapProcessor, exist_ok=True)
