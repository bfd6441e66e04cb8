"""From audio arrays and prompts to what the model takes: windows, token ids, and which text hears which clip.

Decoding files is done before (`af2_ray.audio.decode`): here audio is mono float arrays at 16 kHz.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoFeatureExtractor,
    AutoProcessor,
    BatchFeature,
    FeatureExtractionMixin,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from af2_ray.audio.windows import SAMPLE_RATE, ShortClips, num_windows, to_windows
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.text import AUDIO, CHAT_TEMPLATE, SEP, Message, encode, encode_conversations, template_of

logger = logging.getLogger(__name__)

AudioInput = NDArray[np.floating]
_ANY_LENGTH = 2**30


class AudioFlamingo2FeatureExtractor(FeatureExtractionMixin):
    """Cuts clips into int16 windows.

    Args:
        max_windows: the longest clip, in windows of 10 s; a longer one is an error unless `truncate` is set, and
            a warning if it is.
    """

    model_input_names = ["waveforms", "windows_per_clip"]  # noqa: RUF012 - transformers' own class attribute
    short_clips: ShortClips = "silence"

    def __init__(self, max_windows: int = 30, sampling_rate: int = SAMPLE_RATE, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_windows = max_windows
        self.sampling_rate = sampling_rate

    def __call__(
        self, audio: Sequence[AudioInput], sampling_rate: int | None = None, *, truncate: bool = False
    ) -> BatchFeature:
        """`waveforms` int16 [S, 160000] and `windows_per_clip` [C] of C mono arrays [T] at 16 kHz."""
        if sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate={sampling_rate}: the model takes {self.sampling_rate} Hz; resample, and pass "
                f"sampling_rate={self.sampling_rate}"
            )
        windows = []
        for index, clip in enumerate(audio):
            array = np.asarray(clip)
            if not np.issubdtype(array.dtype, np.floating):
                raise ValueError(f"audio {index} has type {array.dtype}: pass floats in [-1, 1]")
            count = num_windows(array.size)
            if count > self.max_windows:
                problem = f"audio {index} has {count} windows of 10 s, over the limit of {self.max_windows}: "
                if not truncate:
                    raise ValueError(problem + "cut it, or pass truncate=True to keep its beginning")
                logger.warning(problem + "only its beginning is kept")
            try:
                windows.append(to_windows(array, self.max_windows, short_clips=self.short_clips))
            except ValueError as error:
                raise ValueError(f"audio {index}: {error}") from error
        waveforms = np.concatenate(windows) if windows else np.zeros((0, 0), np.int16)
        return BatchFeature(
            {
                "waveforms": torch.from_numpy(waveforms),
                "windows_per_clip": torch.tensor([len(part) for part in windows], dtype=torch.long),
            }
        )


class AudioFlamingo2Processor(ProcessorMixin):
    """Windows and tokens of a batch of questions, ready for `generate` (or, with answers, for training).

    Args:
        max_text_tokens: the longest question with its answer that the model is trained on.
    """

    def __init__(
        self,
        feature_extractor: AudioFlamingo2FeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        max_text_tokens: int = 512,
    ) -> None:
        self.max_text_tokens = max_text_tokens
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def __call__(
        self,
        text: str | Sequence[str],
        audio: AudioInput | Sequence[AudioInput | Sequence[AudioInput]] | None = None,
        *,
        sampling_rate: int | None = None,
        answers: Sequence[str] | None = None,
        max_tokens: int | None = None,
        truncate: bool = False,
        return_tensors: Literal["pt"] | None = None,
        padding: bool = True,
        images: None = None,
        videos: None = None,
    ) -> BatchFeature:
        """Inputs of B questions: one array each, a list of arrays each (several audios, or an empty one), or no audio.

        Prompts are padded on the left for generation; with `answers` on the right, and `labels` are given. They are
        written by the chat template, a system prompt of its own included. What `apply_chat_template` has written
        (it has a `<SEP>`) is taken as it is, audio as one list over all prompts.

        Args:
            max_tokens: tokens of the longest text: one with its answer is cut there, a prompt alone is an error; none:
                texts with answers are cut at `max_text_tokens`, and prompts are as long as they are.
            return_tensors, padding: `pt` and true, always; there for those who pass them.
            images, videos: none, always; there for `apply_chat_template(tokenize=True)`.
        """
        if images or videos or return_tensors not in (None, "pt") or not padding:
            raise ValueError("the model takes text and audio, and gives padded torch tensors: leave the others out")
        prompts = [text] if isinstance(text, str) else list(text)
        formatted = bool(prompts) and all(SEP in prompt for prompt in prompts)
        clips = _clips_of(prompts, audio, formatted=formatted)
        counts = [len(row) for row in clips]
        side: Literal["left", "right"] = "left" if answers is None else "right"
        if max_tokens is None:
            max_tokens = _ANY_LENGTH if answers is None else self.max_text_tokens
        if formatted:
            batch = encode(
                self.tokenizer, prompts, answers, max_tokens=max_tokens, padding_side=side, formatted=formatted
            )
        else:
            turns = [[Message("user", prompt, count)] for prompt, count in zip(prompts, counts, strict=True)]
            if answers is not None:
                pairs = zip(turns, answers, strict=True)
                turns = [[*turn, Message("assistant", answer)] for turn, answer in pairs]
            batch = encode_conversations(
                self.tokenizer, turns, max_tokens=max_tokens, padding_side=side, template=template_of(self)
            )
        if batch.num_truncated and answers is None:
            raise ValueError(f"a prompt is over {max_tokens} tokens, which leaves no room for an answer: shorten it")
        data = {name: torch.from_numpy(getattr(batch, name)) for name in ("input_ids", "attention_mask")}
        if answers is not None:
            data["labels"] = torch.from_numpy(batch.labels)
        if any(counts):
            flat = [clip for row in clips for clip in row]
            data |= self.feature_extractor(flat, sampling_rate, truncate=truncate)
            index = torch.full((len(prompts), max(counts)), -1)
            index[torch.arange(max(counts)) < torch.tensor(counts)[:, None]] = torch.arange(len(flat))
            data["audio_index"] = index
        return BatchFeature(data)

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes."""
        return ["input_ids", "attention_mask", "waveforms", "windows_per_clip", "audio_index"]


def _clips_of(
    prompts: Sequence[str], audio: AudioInput | Sequence[AudioInput | Sequence[AudioInput]] | None, *, formatted: bool
) -> list[list[AudioInput]]:
    """The recordings of each prompt; to prompts that are `formatted` they are dealt by their markers."""
    if audio is None:
        return [[] for _ in prompts]
    given = [audio] if isinstance(audio, np.ndarray) else audio
    clips = [[item] if isinstance(item, np.ndarray) else list(item) for item in given]
    if formatted:
        flat = [clip for row in clips for clip in row]
        ends = np.cumsum([prompt.count(AUDIO) for prompt in prompts]).tolist()
        if ends[-1] != len(flat):
            raise ValueError(f"the prompts have {ends[-1]} {AUDIO} markers for {len(flat)} audios: give one each")
        return [flat[start:end] for start, end in pairwise([0, *ends])]
    if len(clips) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but audio for {len(clips)}: give one entry a prompt")
    return clips


AutoFeatureExtractor.register(AudioFlamingo2Config, AudioFlamingo2FeatureExtractor, exist_ok=True)
AutoProcessor.register(AudioFlamingo2Config, AudioFlamingo2Processor, exist_ok=True)
