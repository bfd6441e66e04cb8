"""Clips and texts as unit vectors of an exported AF-CLAP model, as many windows at a time as memory allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from af2_ray.audio.decode import AudioError, probe
from af2_ray.audio.hear import hear
from af2_ray.data.quarantine import Failure
from af2_ray.data.samples import CaptionSet
from af2_ray.evaluate.contrast import Vectors
from af2_ray.evaluate.table import Labelled
from af2_ray.models.afclap import AfClapModel
from af2_ray.storage.stores import local_model

TEMPLATES = ("{}", "the sound of {}", "this is a sound of {}", "a recording of {}")
"""Wordings of a class name; a class is the mean over all of them."""

_BATCH_TEXTS = 64


@dataclass(frozen=True)
class ClapSettings:
    """How far an AF-CLAP model is asked.

    Attributes:
        max_windows: number of 10 s windows heard of a clip.
        batch_windows: number of windows encoded at a time.
        gallery: number of clips in a retrieval; none: all.
        templates: wordings of a class name, with `{}` for it.
    """

    max_windows: int = 1
    batch_windows: int = 32
    gallery: int | None = None
    templates: Sequence[str] = TEMPLATES


@dataclass(frozen=True)
class ClapModel:
    """A model in evaluation mode with its tokenizer, and how far it is asked."""

    model: AfClapModel
    tokenizer: PreTrainedTokenizerBase
    settings: ClapSettings = ClapSettings()

    @classmethod
    def load(cls, clap_dir: str | Path, settings: ClapSettings) -> ClapModel:
        """An exported AF-CLAP folder, local or remote, on a GPU where there is one.

        Raises:
            ValueError: no model there.
        """
        local = local_model(clap_dir)
        model = AfClapModel.from_pretrained(local).eval()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model, AutoTokenizer.from_pretrained(local), settings)

    @torch.inference_mode()
    def embed_clips(
        self, clips: Sequence[CaptionSet | Labelled]
    ) -> tuple[dict[int, NDArray[np.float32]], list[Failure]]:
        """Unit vectors [J] of the clips that can be read, by index, and the others' faults."""
        vectors: dict[int, NDArray[np.float32]] = {}
        failures: list[Failure] = []
        batch: dict[int, NDArray[np.int16]] = {}
        for index, item in enumerate(clips):
            try:
                stretch = item.stretch
                if not math.isfinite(stretch.duration_s):
                    stretch = replace(stretch, duration_s=probe(item.uri))
                windows = hear(stretch, self.settings.max_windows, short_clips=self.model.config.short_clips)
            except AudioError as error:
                failures.append(Failure(error.uri, error.reason, item.offset_s, error.detail))
                continue
            if batch and sum(map(len, batch.values())) + len(windows) > self.settings.batch_windows:
                vectors |= self._embed_windows(batch)
                batch = {}
            batch[index] = windows
        return vectors | self._embed_windows(batch), failures

    def _embed_windows(self, batch: dict[int, NDArray[np.int16]]) -> dict[int, NDArray[np.float32]]:
        if not batch:
            return {}
        waveforms = torch.from_numpy(np.concatenate(list(batch.values()))).to(self.model.device)
        counts = torch.tensor([len(windows) for windows in batch.values()], device=self.model.device)
        return dict(zip(batch, self.model.get_audio_features(waveforms, counts).float().cpu().numpy(), strict=True))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors [N, J] of texts."""
        padding: dict[str, Any] = {"padding": True}
        if self.model.config.text_pooling == "mean":
            padding = {"padding": "max_length", "max_length": self.model.config.text_length, "truncation": True}
        vectors = []
        for start in range(0, len(texts), _BATCH_TEXTS):
            part = list(texts[start : start + _BATCH_TEXTS])
            inputs = self.tokenizer(part, return_tensors="pt", padding_side="right", **padding).to(self.model.device)
            found = self.model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
            vectors.append(found.float().cpu().numpy())
        return np.concatenate(vectors)

    def embed_classes(self, names: Sequence[str]) -> Vectors:
        """Unit vectors [classes, J]: each the mean over the templates, in their order."""
        parts = [self.embed_texts([text.format(name) for name in names]) for text in self.settings.templates]
        classes = np.add.reduce(parts)
        return np.asarray(classes / np.linalg.norm(classes, axis=1, keepdims=True))
