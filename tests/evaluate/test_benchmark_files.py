"""What it takes to add a benchmark, and the row that each has in a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import serve_toy
from job_runner import run_job
from quiz import write_corpus

from af2_ray.config import Dataset, Evaluation
from af2_ray.data.samples import Sample
from af2_ray.evaluate.benchmarks import BENCHMARKS, find
from af2_ray.evaluate.benchmarks.benchmark import EmbeddingBenchmark, QuestionBenchmark, with_columns
from af2_ray.evaluate.benchmarks.csv_files import folder_of, labelled_csv, read_rows
from af2_ray.evaluate.evaluate import evaluate_run
from af2_ray.evaluate.table import WHOLE_S, Table, usable


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return serve_toy.export(tmp_path_factory.mktemp("model"), tiny_tokenizer)


def make_corpus(folder: Path) -> str:
    return str(write_corpus(folder, num_pairs=2) / "test.json")


def test_a_benchmark_of_labels_is_one_call(tmp_path: Path, make_sound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sound("a.wav", 1.0)
    table = tmp_path / "mine.csv"
    table.write_text("clip,what\na,bark;growl\ngone,bark\n")
    with pytest.raises(ValueError, match=r"columns \['clip', 'what'\] are of no known layout"):
        find(str(table), EmbeddingBenchmark)
    mine = labelled_csv(("clip", "what"), clip=lambda row: (row["clip"], row["what"]), folder=folder_of)
    monkeypatch.setitem(BENCHMARKS, "mine", mine)
    read = find(str(table), EmbeddingBenchmark).read(str(table), None)
    assert [(Path(clip.uri).name, clip.labels) for clip in read.labelled] == [("a.wav", ("bark", "growl"))]
    assert [failure.reason for failure in read.failures] == ["no file"]


def test_a_benchmark_of_questions_brings_its_own_rule_and_groups(
    tmp_path: Path, make_sound: Any, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sound("a.wav", 1.0)
    make_sound("b.wav", 1.0)
    table = tmp_path / "mine.csv"
    table.write_text("clip,question,answer,level\na.wav,what?,x,easy\nb.wav,which?,y,hard\n")

    def read(uri: str, root: str | None) -> Table:
        questions = [
            Sample(row["clip"], f"{tmp_path}/{row['clip']}", 0.0, WHOLE_S, row["question"], row["answer"],
                   task="qa", dataset="mine", meta={"level": row["level"]})
            for row in read_rows(uri)
        ]  # fmt: skip
        found, failures = usable(questions, uri)
        return Table(uri, questions=found, failures=failures)

    mine = QuestionBenchmark(
        with_columns(("clip", "question")),
        read,
        is_right=lambda sample, text: sample.prompt == "what?",
        groups=lambda sample: {"level": sample.meta["level"]},
    )
    monkeypatch.setattr("af2_ray.evaluate.benchmarks.BENCHMARKS", {"mine": mine, **BENCHMARKS})
    other = make_corpus(tmp_path / "other")
    block = Evaluation(manifests=[Dataset(manifest=uri) for uri in (str(table), other)], max_new_tokens=4)
    result = evaluate_run(model_dir, block, deaf=False)
    rows = result.details["by_benchmark"]["mine"]
    assert (rows["all"]["questions"], rows["all"]["model"]) == (2, 0.5)
    assert {name: row["model"] for name, row in rows["by_level"].items()} == {"easy": 1.0, "hard": 0.0}
    assert [prediction.to_json()["right"] for prediction in result.predictions[:2]] == [True, False]
    assert "by_level" not in result.details, "pooled, questions are grouped by what all of them have"


@pytest.mark.parametrize("names", [("first", "second"), ("a/same", "b/same")])
def test_each_manifest_has_a_row(
    tmp_path: Path, model_dir: Path, names: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Named after its dataset; where two have one name, after the manifest, too."""
    manifests = [make_corpus(tmp_path / name) for name in names]
    assert run_job("evaluate", model_dir, *manifests, "--out", tmp_path / "out", "--max-new-tokens", 4) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = metrics["details"]["by_benchmark"]
    same = names[0].endswith("same")
    assert list(rows) == ([f"same ({uri})" for uri in manifests] if same else list(names))
    assert sum(row["all"]["questions"] for row in rows.values()) == metrics["accuracy"]["questions"] == 8
    assert all(row["captions"]["captions"] == 4 for row in rows.values())
    assert set(metrics["details"]) == {"all", "by_skill", "by_duration", "by_benchmark", "captions"}
    out = capsys.readouterr().out
    assert all(name in out for name in (("…a/same/test", "…b/same/test") if same else names))
