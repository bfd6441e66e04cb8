"""The frozen-tower cache (`features: cached`): a Ray Data job encodes each clip of a stage once, before it starts.

It takes the stage's plan and its start folder, and gives shards under `<run>/features/<tower>-<dtype>/` (or
`feature_cache.dir`, which runs may share) and the `FeatureStore` that the feed reads from. It needs decode tasks
(`cluster.decode_cpus` each) and `cluster.num_workers` actors of `cluster.cpus_per_worker` CPUs, with a GPU each where
workers have one. What is there already is not made again, so an interrupted job goes on, a later stage adds only its
own clips, and a stage whose tower has changed meanwhile (fine-tuning) gets a folder of its own.

The trade-off: disk for time. A window of the paper's tower takes 262 kB in bf16 and saves its forward pass in every
epoch but the first; augmentation would need the tower in each of them, so it cannot go with a cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open

from af2_ray.audio.decode import AudioError
from af2_ray.audio.hear import hear
from af2_ray.audio.windows import WINDOW_SAMPLES
from af2_ray.cluster import Actors, map_on_ray, uses_gpu
from af2_ray.config import Cluster, DeepSpeedSettings, FeatureCache
from af2_ray.data.batching import Plan
from af2_ray.data.feature_store import (
    CacheEntry,
    FeatureStore,
    entries_from_json,
    entries_to_json,
    key_of,
    open_folder,
    stamps,
    write_shard,
)
from af2_ray.data.samples import Sample
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.htsat import AudioTower
from af2_ray.storage.stores import local_model
from af2_ray.train.precision import Precision, autocast, resolve

logger = logging.getLogger(__name__)

_PREFIX = "audio_tower."


@dataclass(frozen=True)
class Encoding:
    """How a cache is made: by which tower, in which numbers, for clips of how many windows at most, where."""

    start: str | Path
    folder: Path
    dtype: Precision
    max_windows: int
    threads: int = 1
    on_gpu: bool = False


def cache_features(
    plan: Plan[Sample],
    start: str | Path,
    root: Path,
    *,
    settings: FeatureCache,
    max_windows: int,
    cluster: Cluster,
    deepspeed: DeepSpeedSettings,
) -> FeatureStore:
    """The features of all clips that a plan draws on; those that are lacking are made.

    Args:
        start: Hugging Face folder (or its address in object storage) that has the tower.
        root: folder of all caches, where `settings.dir` names no other.
        max_windows: windows of a clip that are encoded at most.

    Raises:
        ValueError: a cache folder of another tower, or a broken shard.
    """
    started = time.perf_counter()
    encoding = make_encoding(
        start,
        Path(settings.dir or root),
        settings.dtype,
        deepspeed,
        max_windows=max_windows,
        threads=cluster.threads_per_worker,
        on_gpu=uses_gpu(cluster),
    )
    entries = entries_of(plan, max_windows)
    store, lacking = FeatureStore.of(encoding.folder, entries)
    if not lacking:
        logger.info("features of %d clips are in %s", len(entries), encoding.folder)
        return store
    failures = _encode_on_ray(encoding, shards_of(lacking, max_windows, settings.windows_per_shard), cluster)
    store, still = FeatureStore.of(encoding.folder, entries, failures)
    if lost := [stretch.uri for stretch, _ in still if key_of(stretch) not in failures]:
        raise RuntimeError(f"{len(lost)} clips were not encoded, {lost[0]} among them: their files changed meanwhile")
    logger.info("encoded %d clips in %.0f s, %d failed", len(lacking), time.perf_counter() - started, len(failures))
    return store


def make_encoding(
    start: str | Path,
    root: Path,
    dtype: str,
    deepspeed: DeepSpeedSettings,
    *,
    max_windows: int,
    threads: int = 1,
    on_gpu: bool = False,
) -> Encoding:
    """The encoding by the tower of a model folder, its cache folder made or checked."""
    if dtype == "auto":
        dtype = resolve(deepspeed.precision, on_gpu=on_gpu)
    mark = tower_mark(start)
    folder = root.absolute() / f"{mark}-{dtype}"
    open_folder(folder, {"weights": mark, "dtype": dtype})
    return Encoding(start, folder, cast(Precision, dtype), max_windows, threads, on_gpu)


def entries_of(plan: Plan[Sample], max_windows: int) -> list[CacheEntry]:
    """The distinct stretches that a plan hears, with the present stamps of their files."""
    places = np.unique(plan.entries[plan.clip_starts[:-1]])
    samples = (plan.items[place] for place in places.tolist())
    heard = list(dict.fromkeys(part.first(max_windows) for sample in samples for part in sample.stretches))
    uris = list(dict.fromkeys(stretch.uri for stretch in heard))
    stamp = dict(zip(uris, stamps(uris), strict=True))
    return [CacheEntry(stretch, stamp[stretch.uri]) for stretch in heard]


def shards_of(entries: Sequence[CacheEntry], max_windows: int, windows_per_shard: int) -> list[list[CacheEntry]]:
    """Clips by length, long ones first, in groups of about so many windows."""
    counts = {entry: entry.stretch.num_windows(max_windows) for entry in entries}
    ordered = sorted(entries, key=lambda entry: (-counts[entry], entry))
    ends = np.cumsum([counts[entry] for entry in ordered])
    numbered = zip(((ends - 1) // windows_per_shard).tolist(), ordered, strict=True)
    return [[entry for _, entry in group] for _, group in groupby(numbered, key=lambda pair: pair[0])]


# --- The tower ---------------------------------------------------------------------------------------------------


def tower_mark(start: str | Path) -> str:
    """SHA-256 (first 16 hex digits) of a model folder's tower: its configuration, names, shapes and weights."""
    digest = hashlib.sha256(_tower_config(start).to_json_string(use_diff=False).encode())
    for name, tensor in sorted(_tower_tensors(start)):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def load_tower(start: str | Path) -> AudioTower:
    """The tower of a model folder alone, frozen, without the LM being read."""
    tower = AudioTower(_tower_config(start))
    tower.load_state_dict(dict(_tower_tensors(start)))
    return tower.requires_grad_(False).eval()


def _tower_config(start: str | Path) -> Any:
    return AudioFlamingo2Config.from_pretrained(local_model(start)).audio_config


def _tower_tensors(start: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    paths = sorted(local_model(start).glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{start} has no *.safetensors: a stage starts from a Hugging Face folder")
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name.startswith(_PREFIX):
                    yield name.removeprefix(_PREFIX), file.get_tensor(name)


# --- The job -----------------------------------------------------------------------------------------------------


def decode_row(row: dict[str, Any], max_windows: int) -> dict[str, Any]:
    """The clips of a shard, decoded: samples of all windows in `waveforms`, windows of each clip in `counts`.

    A clip that fails has none; why is in `failures` (key, reason and detail of each, JSON).
    """
    windows, failures = [], []
    for stretch, _ in entries_from_json(row["clips"]):
        try:
            windows.append(hear(stretch, max_windows))
        except AudioError as error:
            failures.append((key_of(stretch), error.reason, error.detail))
            windows.append(np.zeros((0, WINDOW_SAMPLES), np.int16))
    flat = np.concatenate(windows).reshape(-1)
    return {
        "clips": row["clips"],
        "counts": np.array([len(part) for part in windows], np.int64),
        "waveforms": flat if flat.size else np.zeros(1, np.int16),  # Arrow has no tensor without elements
        "failures": json.dumps(failures),
    }


class FeatureEncoder:
    """Decoded clips to a shard: the tower's forward, once. One actor of the job."""

    def __init__(self, encoding: Encoding) -> None:
        torch.set_num_threads(encoding.threads)
        self._folder, self._device = encoding.folder, "cuda" if encoding.on_gpu else "cpu"
        self._precision = encoding.dtype
        dtype = torch.bfloat16 if encoding.dtype == "bf16" else torch.float32
        self._tower = load_tower(encoding.start).to(self._device, dtype)

    @torch.inference_mode()
    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write the shard of a row's clips that have windows (`decode_row`), and hand on its failures."""
        counts = np.asarray(row["counts"])
        entries = [entry for entry, count in zip(entries_from_json(row["clips"]), counts, strict=True) if count]
        if entries:
            windows = torch.tensor(row["waveforms"], dtype=torch.int16, device=self._device).reshape(-1, WINDOW_SAMPLES)
            with autocast(self._device, self._precision):
                features = self._tower(windows).cpu()
            if features.dtype == torch.bfloat16:
                features = features.view(torch.int16)
            parts = features.split(counts[counts > 0].tolist())
            write_shard(self._folder, entries, [part.numpy() for part in parts])
        return {"failures": row["failures"]}


def _encode_on_ray(
    encoding: Encoding, shards: Sequence[Sequence[CacheEntry]], cluster: Cluster
) -> dict[int, tuple[str, str]]:
    """Encode shards on the cluster; why clips failed, by key."""
    rows = [{"clips": entries_to_json(entries)} for entries in shards]
    decode = partial(decode_row, max_windows=encoding.max_windows)
    done = map_on_ray(
        rows, FeatureEncoder, [encoding], Actors.of(cluster), prepare=decode, prepare_cpus=cluster.decode_cpus
    )
    failures: dict[int, tuple[str, str]] = {}
    for number, row in enumerate(done, 1):
        failures |= {key: (reason, detail) for key, reason, detail in json.loads(row["failures"])}
        logger.info("features: %d of %d shards", number, len(rows))
    return failures
