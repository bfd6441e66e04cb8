from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quiz import write_corpus

from af2_ray.data.manifest import read_captions
from af2_ray.evaluate import clap


class Ears(torch.nn.Module):
    """Knows by the pitch which label comes first and second, and reads the same from captions."""

    class config:
        text_pooling = "masked_mean"

    device = torch.device("cpu")

    def get_audio_features(self, waveforms: torch.Tensor, windows_per_clip: torch.Tensor) -> torch.Tensor:
        found = []
        for windows in waveforms.split(windows_per_clip.tolist()):
            sound = windows.flatten().numpy()
            sound = sound[: int(np.flatnonzero(sound).max()) + 1].astype(float)
            peaks = []
            for half in np.array_split(sound, 2):
                spectrum = np.abs(np.fft.rfft(half))
                peaks.append(spectrum.argmax() * 16_000 / len(half))
            found.append(self.unit(*(int(np.argmin(np.abs(np.array([220, 660, 1760, 4000]) - hz))) for hz in peaks)))
        return torch.stack(found)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.unit(int(row[0]), int(row[1])) for row in input_ids])

    @staticmethod
    def unit(first: int, second: int) -> torch.Tensor:
        vector = torch.zeros(8)
        vector[first], vector[4 + second] = 1.0, 1.0
        return vector / vector.norm()


class Reader:
    """Turns `low, then high` into the two labels' numbers."""

    def __call__(self, texts: list[str], **_: Any) -> Any:
        from transformers import BatchEncoding

        labels = ["low", "middle", "high", "shrill"]
        ids = torch.tensor([[labels.index(word) for word in text.split(", then ")] for text in texts])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _use(monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module) -> None:
    monkeypatch.setattr(clap.AfClapModel, "from_pretrained", lambda *_: model)
    monkeypatch.setattr(clap.AutoTokenizer, "from_pretrained", lambda *_: Reader())


def test_a_model_that_hears_scores_full_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, Ears())
    corpus = write_corpus(tmp_path, num_pairs=6)
    found = clap.evaluate_clap("", str(corpus / "test.captions.jsonl"), gallery=4, max_windows=2)
    assert found["gallery"] == 4
    assert found["t2a_r1_chance"] == 0.25
    assert (found["t2a_r1"], found["a2t_r1"], found["order_accuracy"], found["order_pairs"]) == (1.0, 1.0, 1.0, 6)
    assert found["failures"] == []


def test_a_model_that_ignores_order_is_never_right_about_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal similarity is no preference: a tie counts as wrong."""

    class Bag(Ears):
        @staticmethod
        def unit(first: int, second: int) -> torch.Tensor:
            return Ears.unit(min(first, second), max(first, second))

    _use(monkeypatch, Bag())
    corpus = write_corpus(tmp_path, num_pairs=4)
    found = clap.evaluate_clap("", str(corpus / "test.captions.jsonl"), gallery=4, max_windows=2)
    assert (found["t2a_r1"], found["order_accuracy"]) == (1.0, 0.0)


def test_gallery_scenes_differ_in_their_events() -> None:
    events = [frozenset(names) for names in ("ab", "ba", "a", "bc", "c", "cb")]
    assert clap.choose_gallery(events, 3) == [0, 2, 3]
    assert clap.choose_gallery(events, 10) == [0, 2, 3, 4]


def test_recall() -> None:
    similarity = np.array([[3, 1, 2], [9, 2, 1], [0, 1, 5]], dtype=np.float32)
    assert clap.recall_at(similarity, 1) == pytest.approx(2 / 3)
    assert clap.recall_at(similarity, 2) == 1.0


def test_unreadable_clips_are_set_aside_and_missing_truth_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use(monkeypatch, Ears())
    corpus = write_corpus(tmp_path, num_pairs=4)
    (corpus / "test/00000.flac").write_bytes(b"")
    captions = corpus / "test.captions.jsonl"
    found = clap.evaluate_clap("", str(captions), gallery=4, max_windows=2)
    assert found["gallery"] == 3
    assert [failure.reason for failure in found["failures"]] == ["empty file"]
    assert found["order_pairs"] == 3
    lines = (corpus / "test.scenes.jsonl").read_text().splitlines()
    (corpus / "test.scenes.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match=r"no scene '00000\.flac'"):
        clap.evaluate_clap("", str(captions))
    (corpus / "test.scenes.jsonl").write_text(lines[0] + "\n" + json.dumps({"events": []}))
    with pytest.raises(ValueError, match="line 2"):
        clap.evaluate_clap("", str(captions))


def test_the_real_model_runs(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from transformers import T5Config

    from af2_ray.models.afclap import AfClapConfig, AfClapModel
    from af2_ray.models.htsat import tower_config

    torch.manual_seed(0)
    text = T5Config(vocab_size=len(tiny_tokenizer), d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    audio = tower_config(8, [1, 1, 1, 1], [1, 2, 2, 2])
    model = AfClapModel(AfClapConfig(text_config=text, audio_config=audio, projection_dim=8))
    model.save_pretrained(tmp_path / "clap")
    tiny_tokenizer.save_pretrained(tmp_path / "clap")
    corpus = write_corpus(tmp_path)
    found = clap.evaluate_clap(tmp_path / "clap", str(corpus / "test.captions.jsonl"), gallery=4)
    assert 0 <= found["t2a_r1"] <= 1
    assert len(read_captions(str(corpus / "test.captions.jsonl"))) == 2 * found["order_pairs"]
