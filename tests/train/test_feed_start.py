"""Where the feed of a job begins: after the last checkpoint's step, never past the last step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from af2_ray.train import feed_start


@pytest.mark.parametrize(("done", "start"), [(0, 0), (3, 12), (9, 36), (10, 36)])
def test_the_feed_begins_after_the_last_checkpoint(monkeypatch: pytest.MonkeyPatch, done: int, start: int) -> None:
    class Plan(list[int]):
        step_batches = 4

    asked: list[Any] = []
    monkeypatch.setattr(feed_start, "last_step", lambda storage: done)
    monkeypatch.setattr(feed_start, "make_dataset", lambda *given, **more: asked.append((given, more)))
    plan: Any = Plan(range(40))  # ten steps
    feed_start.Feed(plan, SimpleNamespace(), "storage", 0.25)()
    assert asked[0][1] == {"start": start, "decode_cpus": 0.25}


def test_before_the_first_checkpoint_no_step_is_done(tmp_path: Any) -> None:
    assert feed_start.last_step(str(tmp_path)) == 0
