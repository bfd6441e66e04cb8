"""AF-CLAP behind an API: words and recordings to unit vectors of one space, many requests in one pass."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from af2_ray.audio.windows import INT16_SCALE, SAMPLE_RATE, to_windows
from af2_ray.engine.request import Clip, Embedded, RequestFailure
from af2_ray.models.afclap import AfClapConfig, AfClapModel
from af2_ray.models.processing_afclap import AfClapProcessor
from af2_ray.storage.stores import local_model

Item = str | Clip
_WINDOWS_PER_PASS = {"cpu": 8, "cuda": 128}  # bounds the memory of a pass, whatever a batch holds
_TEXTS_PER_PASS = 256
_TEXTS_READ = 16  # tokenised at one time, before it is known whether they are too long


@dataclass
class Embedder:
    """A model, its tokenizer, and the device they run on."""

    model: AfClapModel
    processor: AfClapProcessor
    _reader: PreTrainedTokenizerBase = field(init=False)

    def __post_init__(self) -> None:
        # A copy that nobody sets to cut or pad: a tokenizer must not change its settings while another thread reads.
        self._reader = copy.deepcopy(self.processor.tokenizer)

    @classmethod
    def from_pretrained(cls, folder: str, device: str = "auto") -> Self:
        """From an AF-CLAP export, local or remote; `auto`: on the GPU where there is one.

        Raises:
            ValueError: there is no model, or it is another one.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        local = local_model(folder)
        config = AutoConfig.from_pretrained(local)
        if not isinstance(config, AfClapConfig):
            raise ValueError(f"{folder} holds {config.model_type!r}; embeddings need an AF-CLAP export")
        model = AfClapModel.from_pretrained(local, dtype=torch.float32).to(device).eval()
        return cls(model, AfClapProcessor.of(model.config, AutoTokenizer.from_pretrained(local)))

    def read(self, items: Sequence[Item]) -> int | RequestFailure:
        """Text tokens of the items together, or what is wrong with one of them; from any thread.

        Few texts at a time are tokenised, so that a request whose texts are all too long costs no more than its first.
        """
        texts = [(place, item) for place, item in enumerate(items) if isinstance(item, str)]
        limit, total = self.processor.text_length, 0
        for start in range(0, len(texts), _TEXTS_READ):
            part = texts[start : start + _TEXTS_READ]
            for (place, _), ids in zip(part, self._reader([text for _, text in part])["input_ids"], strict=True):
                if len(ids) > limit:
                    return RequestFailure(
                        f"input {place}: {len(ids)} tokens, more than the {limit} of this model: shorten it", True
                    )
                total += len(ids)
        return total

    @torch.inference_mode()
    def __call__(self, requests: Sequence[Sequence[Item]]) -> list[Embedded]:
        """Vectors of each request's items, float32 [N, J], in order; `read` has been called with each."""
        items = [item for request in requests for item in request]
        vectors = np.empty((len(items), self.model.config.projection_dim), np.float32)
        texts = [place for place, item in enumerate(items) if isinstance(item, str)]
        clips = [place for place, item in enumerate(items) if not isinstance(item, str)]
        if texts:
            vectors[texts] = self._texts([str(items[place]) for place in texts]).float().cpu().numpy()
        if clips:
            heard = [self._windows(item) for item in items if isinstance(item, Clip)]
            vectors[clips] = self._clips(heard).float().cpu().numpy()
        starts = np.cumsum([0, *map(len, requests)])
        scale = float(self.model.logit_scale.exp())
        return [Embedded(vectors[a:b], scale) for a, b in itertools.pairwise(starts)]

    def _texts(self, texts: list[str]) -> Tensor:
        encoded = self.processor(texts).to(self.model.device)
        return self.model.get_text_features(
            encoded["input_ids"], encoded["attention_mask"], captions_per_chunk=_TEXTS_PER_PASS
        )

    def _clips(self, clips: list[NDArray[np.int16]]) -> Tensor:
        waveforms = torch.from_numpy(np.concatenate(clips)).to(self.model.device)
        room = _WINDOWS_PER_PASS.get(self.model.device.type, 8)
        return self.model.get_audio_features(waveforms, [len(clip) for clip in clips], windows_per_chunk=room)

    def _windows(self, clip: Clip) -> NDArray[np.int16]:
        """A clip's windows [W, 160000] as this model takes them."""
        if clip.windows is None:
            raise ValueError("a clip to be embedded comes with its windows")
        if self.model.config.short_clips == "silence" or clip.num_windows > 1:
            return clip.windows
        mono = clip.windows[0, : round(clip.duration_s * SAMPLE_RATE)] / INT16_SCALE
        return to_windows(mono, short_clips="repeat")
