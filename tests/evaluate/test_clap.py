from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from job_runner import run_job
from quiz import write_corpus

from af2_ray.data.manifest import read_captions
from af2_ray.evaluate.benchmarks import find
from af2_ray.evaluate.benchmarks.benchmark import EmbeddingBenchmark
from af2_ray.evaluate.clap_embed import ClapModel, ClapSettings
from af2_ray.evaluate.clap_score import ClapScores, score_labels
from af2_ray.evaluate.evaluate import evaluate_clap
from af2_ray.evaluate.items import share_right
from af2_ray.evaluate.scenes import choose_gallery
from af2_ray.evaluate.table import Table


class Ears(torch.nn.Module):
    """Knows by the pitch which label comes first and second, and reads the same from captions."""

    class config:
        text_pooling = "masked_mean"
        text_length = 77
        short_clips = "silence"

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
        found = [[labels.index(word) for word in re.findall("|".join(labels), text)] for text in texts]
        ids = torch.tensor([(row * 2)[:2] for row in found])  # one sound alone is first and last
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def evaluate(captions: Path, gallery: int | None = 4, model: type[torch.nn.Module] = Ears) -> ClapScores:
    settings = ClapSettings(max_windows=2, gallery=gallery)
    return evaluate_clap(ClapModel(model(), Reader(), settings), str(captions))  # type: ignore[arg-type]


def read(path: Path) -> Table:
    return find(str(path), EmbeddingBenchmark).read(str(path), None)


def test_a_model_that_hears_scores_full_marks(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, num_pairs=6)
    scores = evaluate(corpus / "test.captions.jsonl")
    found = scores.figures
    assert found["gallery"] == 4
    assert found["t2a_r1_chance"] == 0.25
    assert (found["t2a_r1"], found["a2t_r1"], found["order_accuracy"], found["order_pairs"]) == (1.0, 1.0, 1.0, 6)
    assert (found["t2a_map10"], found["a2t_map10"]) == (1.0, 1.0)
    assert found["choice"] == {"order": {"pairs": 6, "accuracy": 1.0, "both": 1.0}}
    assert found["zero_shot"]["classes"] == 4
    assert scores.failures == []


def test_a_model_that_has_learned_the_form_of_words_is_told_from_one_that_reads(tmp_path: Path) -> None:
    """It takes the first word for the first sound: right of `a, then b`, wrong of `b after a`."""
    for folder, words, right in (("a", "{first} before {second}", 1.0), ("b", "{second} after {first}", 0.0)):
        corpus = write_corpus(tmp_path / folder, num_pairs=4, words=words)
        scores = evaluate(corpus / "test.captions.jsonl")
        found, items = scores.figures, scores.items
        assert found["choice"] == {"order": {"pairs": 4, "accuracy": 1.0, "both": 1.0, "both_reworded": right}}
        assert found["t2a_r1_reworded"] == right
        both = {
            wording: [m.right for m in items if f"order, {wording}" in m.groups]
            for wording in ("captions", "paraphrases")
        }
        assert both == {"captions": [1.0] * 4, "paraphrases": [right] * 4}
        assert share_right(items, "composition") == (1 + right) / 2
        assert len({(item.measure, item.item) for item in items}) == len(items)


def test_a_model_that_ignores_order_is_never_right_about_it(tmp_path: Path) -> None:
    """Equal similarity is no preference: a tie counts as wrong."""

    class Bag(Ears):
        @staticmethod
        def unit(first: int, second: int) -> torch.Tensor:
            return Ears.unit(min(first, second), max(first, second))

    corpus = write_corpus(tmp_path, num_pairs=4)
    found = evaluate(corpus / "test.captions.jsonl", model=Bag).figures
    assert (found["t2a_r1"], found["order_accuracy"]) == (1.0, 0.0)
    assert found["choice"]["order"]["both"] == 0.0


def test_gallery_scenes_differ_in_their_events() -> None:
    events = [frozenset(names) for names in ("ab", "ba", "a", "bc", "c", "cb")]
    assert choose_gallery(events, 3) == [0, 2, 3]
    assert choose_gallery(events, 10) == [0, 2, 3, 4]


def test_unreadable_clips_are_set_aside_and_missing_truth_is_named(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, num_pairs=4)
    (corpus / "test/00000.flac").write_bytes(b"")
    captions = corpus / "test.captions.jsonl"
    found = evaluate(captions)
    assert found.figures["gallery"] == 3
    assert [failure.reason for failure in found.failures] == ["empty file"]
    assert found.figures["order_pairs"] == 3
    lines = (corpus / "test.scenes.jsonl").read_text().splitlines()
    (corpus / "test.scenes.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match=r"no scene '00000\.flac'"):
        evaluate(captions)
    (corpus / "test.scenes.jsonl").write_text(lines[0] + "\n" + json.dumps({"events": []}))
    with pytest.raises(ValueError, match="line 2"):
        evaluate(captions)


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
    clap = ClapModel.load(tmp_path / "clap", ClapSettings(gallery=4))
    found = evaluate_clap(clap, str(corpus / "test.captions.jsonl")).figures
    assert 0 <= found["t2a_r1"] <= 1
    assert len(read_captions(str(corpus / "test.captions.jsonl"))) == 2 * found["order_pairs"]

    (corpus / "labels.csv").write_text("file,label\ntest/00000.flac,dog\ntest/00001.flac,bell\n")
    data = [str(corpus / name) for name in ("test.captions.jsonl", "labels.csv")]
    assert run_job("evaluate_clap", tmp_path / "clap", *data, "--out", tmp_path / "clap.json") == 0
    written = json.loads((tmp_path / "clap.json").read_text())
    assert written[data[0]]["choice"]["order"]["pairs"] == found["order_pairs"]
    assert written[data[1]]["classes"] == 2
    assert run_job("evaluate_clap", tmp_path / "clap", corpus / "none.csv") == 2
    assert run_job("evaluate_clap", tmp_path, *data) == 2


def test_captions_without_truth_are_scored_with_all_their_wordings_and_negatives(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, num_pairs=2)
    lines = [json.loads(line) for line in (corpus / "test.captions.jsonl").read_text().splitlines()]
    for line in lines:
        first, second = line["caption"].split(", then ")
        line |= {
            "positives": [f"{first}, then the {second}"],
            "negatives": [[f"{second}, then {first}", f"{first}, then {first}"]] * 2,
            "relations": ["order", "class"] * 2,
        }
    (corpus / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = evaluate(corpus / "own.jsonl", gallery=None).figures
    assert (found["gallery"], found["captions"], found["t2a_r1"], found["a2t_map10"]) == (4, 8, 1.0, 1.0)
    assert found["negatives"] == {"clips": 4, "each": 1.0, "all": 1.0, "by_kind": {"class": 1.0, "order": 1.0}}
    assert found["choice"] == {}
    assert "zero_shot" not in found


@pytest.mark.parametrize("layout", ["esc50", "us8k", "any"])
def test_labelled_benchmarks(layout: str, tmp_path: Path, make_sound: Any) -> None:
    names = {"esc50": "audio/1-{}-A-0.wav", "us8k": "audio/fold3/{}.wav", "any": "{}.wav"}
    labels = {"low": 220, "high": 1760, "shrill": 4000}
    rows: list[dict[str, object]] = []
    for label, hz in labels.items():
        path = make_sound(names[layout].format(hz), 4.0, hz=hz)
        rows.append(
            {
                "esc50": {"filename": Path(path).name, "fold": 1, "target": 0, "category": label},
                "us8k": {"slice_file_name": Path(path).name, "fsID": 1, "fold": 3, "classID": 0, "class": label},
                "any": {"fname": hz, "labels": f"{label},{label}"},
            }[layout]
        )
    rows.append({**rows[0], next(iter(rows[0])): "gone"})
    folder = {"esc50": "meta", "us8k": "metadata", "any": "."}[layout]
    (tmp_path / folder).mkdir(exist_ok=True)
    with (tmp_path / folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = read(tmp_path / folder / "table.csv")
    assert len(table.labelled) == 3
    assert [failure.reason for failure in table.failures] == ["no file"]
    scores = score_labels(ClapModel(Ears(), Reader()), table)  # type: ignore[arg-type]
    found = scores.figures
    assert (found["clips"], found["classes"], found["top1"], found["map"]) == (3, 3, 1.0, 1.0)
    assert found["by_class"] == {"high": 1.0, "low": 1.0, "shrill": 1.0}
    assert len(scores.failures) == 1


def test_scenes_are_classed_by_their_truth(tmp_path: Path, make_sound: Any) -> None:
    """All of them, where captions are asked for in a gallery of different sets of events only."""
    rows = []
    for label, hz in {"low": 220, "high": 1760}.items():
        for take in range(2):
            path = Path(make_sound(f"test/{label}{take}.wav", 4.0, hz=hz))
            rows.append({"name": path.name, "duration": 4.0, "events": [{"label": label}]})
    truth = tmp_path / "test.scenes.jsonl"
    truth.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "name": "gone.wav"}]))
    scores = score_labels(ClapModel(Ears(), Reader()), read(truth))  # type: ignore[arg-type]
    found = scores.figures
    assert (found["clips"], found["classes"], found["top1"]) == (4, 2, 1.0)
    assert [failure.uri for failure in scores.failures] == [str(tmp_path / "test" / "gone.wav")]
    truth.write_text('{"name": "low0.wav", "duration": 4.0}\n')
    with pytest.raises(ValueError, match="a scene needs `duration` and `events`"):
        read(truth)


def test_captioned_benchmarks(tmp_path: Path, make_sound: Any) -> None:
    for name in ("evaluation/rain on tin.wav", "evaluation/bell.wav"):
        make_sound(name, 1.0)
    clotho = tmp_path / "clotho_captions_evaluation.csv"
    header = "file_name," + ",".join(f"caption_{i}" for i in range(1, 6)) + "\n"
    clotho.write_text(header + 'rain on tin.wav,"rain, on tin",b,c,d,e\nbell.wav,f,g,h,i,j\n')
    table = read(clotho)
    assert [(Path(i.uri).name, i.caption, len(i.positives)) for i in table.captions] == [
        ("rain on tin.wav", "rain, on tin", 4),
        ("bell.wav", "f", 4),
    ]
    for name in ("caps/Yabc.flac", "caps/d_f_30.wav"):
        make_sound(name, 1.0)
    caps = tmp_path / "caps" / "test.csv"
    caps.write_text("audiocap_id,youtube_id,start_time,caption\n1,abc,10,x\n2,d_f,30,y\n3,abc,10,z\n4,none,0,w\n")
    table = read(caps)
    assert [(Path(i.uri).name, i.caption, i.positives) for i in table.captions] == [
        ("Yabc.flac", "x", ("z",)),
        ("d_f_30.wav", "y", ()),
    ]
    assert [failure.uri.rsplit("/", 1)[-1] for failure in table.failures] == ["none_0"]
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no known layout"):
        read(tmp_path / "odd.csv")
