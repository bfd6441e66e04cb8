"""Fixtures for all tests: a small Ray cluster, sound files made on the spot, a tiny tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("AF2_SCHEMES", "memory")  # a store without a server
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

import hostile_names
import nodes
import numpy as np
import pytest
import soundfile as sf
from xdist.scheduler import LoadScopeScheduling

MakeSound = Callable[..., str]
_RAY, _CHAIN = Path(__file__).parent / "ray", Path(__file__).parent / "chain"


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """For `-n 2`: a file goes whole to a process, for what its tests share is made once; tests/ray all to one."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.startswith("tests/ray/") else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs Ray first, for it takes longest; the whole chain, which keeps both cores busy, last."""
    items.sort(key=lambda item: (_CHAIN in item.path.parents) - (_RAY in item.path.parents))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A local Ray cluster of 4 (logical) CPUs, shared by the whole test session."""
    import ray
    import ray.data

    reports = {"metrics_report_interval_ms": 1000}  # the default of ten seconds is only waited for
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _system_config=reports)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


@pytest.fixture
def make_sound(tmp_path: Path) -> MakeSound:
    """Function that writes a sound file of noise under a tone and returns its path.

    The tone's frequency tells files apart; `channels`, `rate`, `peak` and the name's suffix are free.
    """

    def make(
        name: str = "clip.flac",
        duration_s: float = 1.0,
        *,
        hz: float = 440.0,
        rate: int = 16_000,
        channels: int = 1,
        peak: float = 0.5,
        **write: Any,
    ) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        t = np.arange(round(duration_s * rate)) / rate
        tone = peak * (0.9 * np.sin(2 * np.pi * hz * t) + 0.1 * np.random.default_rng(int(hz)).uniform(-1, 1, t.size))
        sf.write(path, np.stack([tone / (c + 1) for c in range(channels)], axis=1), rate, **write)
        return str(path)

    return make


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[hostile_names.Listener]:
    """A port that must not be connected to, while a secret is planted and no scheme is added."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", hostile_names.SECRET)
    monkeypatch.delenv("AF2_SCHEMES", raising=False)
    with hostile_names.listening() as listener:
        yield listener


@pytest.fixture
def hostile(listener: hostile_names.Listener, tmp_path: Path) -> list[tuple[str, str]]:
    """Names that nobody should open, and the reason for which each is set aside."""
    return hostile_names.names(listener.address, tmp_path)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level tokenizer of 320 tokens with the model's special tokens."""
    from af2_ray.text import add_special_tokens, train_tokenizer

    texts = ["which sound is heard? (a) dog (b) bell (c) drum (d) phone", "a dog barks before a bell rings"]
    tokenizer = train_tokenizer(texts, vocab_size=320)
    add_special_tokens(tokenizer)
    return tokenizer


@pytest.fixture
def ray_head(tmp_path: Path) -> Iterator[nodes.Nodes]:
    """A `ray start --head` of its own, with a dashboard that takes jobs."""
    head = nodes.Nodes(tmp_path, head_cpus=4)
    try:
        yield head
    finally:
        head.stop()
