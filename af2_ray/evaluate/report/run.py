"""One self-contained page that shows a run: what it scores, what it heard, how it learned, on what data.

A short recording is in it, too; the price is about a megabyte.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from af2_ray.audio.decode import decode
from af2_ray.evaluate.answers import normalise_answer
from af2_ray.evaluate.report import plots
from af2_ray.evaluate.report.page import audio_uri, render
from af2_ray.evaluate.report.scene import draw_scene

TITLES = {"lm": "language model", "clap": "AF-CLAP"}

_MOST_AUDIO_S = 40.0


def write_report(
    path: str | Path,
    summary: Mapping[str, Any],
    *,
    losses: Mapping[str, Sequence[tuple[int, float]]],
    details: Mapping[str, Any] | None = None,
    scene: Mapping[str, Any] | None = None,
    predictions: Sequence[Mapping[str, Any]] = (),
    corpus: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the page; a part whose facts are missing is left out.

    Args:
        path: name of the HTML file; its folder is made.
        summary: contents of summary.json.
        losses: pairs (step, loss) by `lm`, `clap` and the stages' names, in order.
        details: rows by skill, duration and benchmark with controls and intervals (`scoring.score`).
        scene: held-out scene of the summary's `answer`: `uri`, `duration_s` and `events` as in scenes.jsonl
            (`label`, `onsets_s`, `hit_s`).
        predictions: examples to show, rows of predictions.jsonl (`choose_examples`).
        corpus: rows of the corpus table (`licence_rows`), all with the same keys.
    """
    page = render(
        "run.html",
        title="Audio Flamingo 2, the whole chain once",
        summary=summary,
        scene=_scene(scene, summary.get("answer") or {}) if scene else None,
        accuracy=_accuracy(details) if details else None,
        captions=(details or {}).get("captions"),
        losses=plots.losses(losses, TITLES) if any(losses.values()) else None,
        padding=plots.padding(summary["stages"]) if summary.get("stages") else None,
        examples=predictions,
        corpus=corpus,
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")


def licence_rows(sources_csv: str | Path) -> list[dict[str, Any]]:
    """The corpus table: source clips, classes and seconds by package and licence, from the corpus' sources.csv."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    with Path(sources_csv).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            groups[row["package"], row["licence"]].append(row)
    return [
        {
            "source": package,
            "licence": licence,
            "clips": len(rows),
            "classes": len({row["label"] for row in rows}),
            "seconds": round(sum(float(row["duration_s"]) for row in rows)),
        }
        for (package, licence), rows in sorted(groups.items())
    ]


def _scene(scene: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    duration_s = float(scene["duration_s"])
    mono = decode(str(scene["uri"]), 0.0, duration_s)
    return {
        **scene,
        "svg": draw_scene(mono, scene["events"], duration_s),
        "audio": audio_uri(mono, "flac") if duration_s <= _MOST_AUDIO_S else None,
        "right": normalise_answer(str(answer.get("text", ""))) == normalise_answer(str(answer.get("expected", ""))),
    }


def _accuracy(details: Mapping[str, Any]) -> dict[str, Any]:
    durations = {f"{name.replace('<=', '≤ ')} s": row for name, row in details["by_duration"].items()}
    rows = [("all", details["all"]), *details["by_skill"].items(), *durations.items()]
    if len(benchmarks := details.get("by_benchmark", {})) > 1:
        rows += [(name, row["all"]) for name, row in benchmarks.items() if "all" in row]
    if details.get("seen"):
        rows.append(("new scenes of training clips", details["seen"]))
    return {
        "by_skill": plots.accuracies(details["by_skill"], "accuracy by skill"),
        "by_duration": plots.accuracies(durations, "accuracy by duration"),
        "all": details["all"],
        "rows": rows,
    }
