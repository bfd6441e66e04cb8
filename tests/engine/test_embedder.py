"""AF-CLAP behind the API: what shares a pass changes nothing, and what does not fit is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serve_toy

from af2_ray.audio.windows import to_windows
from af2_ray.engine.embedder import Embedder, Item
from af2_ray.engine.request import Clip, RequestFailure


def clip(duration_s: float, hz: float) -> Clip:
    mono = 0.5 * np.sin(2 * np.pi * hz * np.arange(round(duration_s * 16_000)) / 16_000)
    return Clip.of(to_windows(mono), duration_s=duration_s)


@pytest.fixture
def embedder(tmp_path: Path, tiny_tokenizer: Any) -> Embedder:
    return Embedder.from_pretrained(str(serve_toy.export_clap(tmp_path, tiny_tokenizer)))


def test_requests_that_share_a_pass_get_what_they_get_alone(embedder: Embedder) -> None:
    requests: list[list[Item]] = [["a bell", clip(25, 300)], [clip(3, 900)], ["a dog barks at a bell", "a bell"]]
    together = embedder(requests)
    for request, embedded in zip(requests, together, strict=True):
        np.testing.assert_allclose(embedded.vectors, embedder([request])[0].vectors, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(embedded.vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(together[0].vectors[0], together[2].vectors[1], atol=1e-5)
    assert together[0].scale == pytest.approx(1 / 0.07, rel=1e-3)


def test_a_text_that_the_model_would_cut_is_refused(embedder: Embedder) -> None:
    told = embedder.read(["a bell", "words " * 100])
    assert isinstance(told, RequestFailure)
    assert told.by_caller
    assert "input 1" in told.message
    assert embedder.read([clip(1, 300)]) == 0
    tokens = embedder.read(["a bell"])
    assert isinstance(tokens, int)
    assert tokens > 0


def test_a_model_that_repeats_short_clips_gets_them_repeated(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = serve_toy.export_clap(tmp_path, tiny_tokenizer, short_clips="repeat")
    short = clip(3, 300)
    assert short.windows is not None
    whole = Clip.of(to_windows(short.windows[0, :48_000] / 32_768, short_clips="repeat"), duration_s=9.0)
    embedder = Embedder.from_pretrained(str(folder))
    one, other = (embedded.vectors for embedded in embedder([[short], [whole]]))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_folder_of_another_model_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="need an AF-CLAP export"):
        Embedder.from_pretrained(str(serve_toy.export(tmp_path / "lm", tiny_tokenizer)))
    with pytest.raises(ValueError, match="no model in"):
        Embedder.from_pretrained(str(tmp_path))
