"""One self-contained page that shows a run: what it scores, what it heard, how it learned, on what data.

A short recording is in it, too; the price is about a megabyte.
"""

from __future__ import annotations

import base64
import csv
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from af2_ray.audio.decode import decode
from af2_ray.audio.windows import SAMPLE_RATE
from af2_ray.data.quarantine import Failure
from af2_ray.evaluate.answers import normalise_answer
from af2_ray.evaluate.report import plots
from af2_ray.evaluate.report.page import percent, render
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
    failures: Sequence[Failure] = (),
    title: str = "Audio Flamingo 2, the whole chain once",
) -> None:
    """Write the page; a part whose facts are missing is left out.

    Args:
        path: name of the HTML file; its folder is made.
        summary: contents of summary.json.
        losses: pairs (step, loss) by `lm`, `clap` and the stages' names, in order.
        details: rows by skill, duration and benchmark with controls and intervals (`AnswerScores.to_json`).
        scene: held-out scene: `uri`, `duration_s`, `events` as in scenes.jsonl (`label`, `onsets_s`, `hit_s`), and
            the HTTP exchange `question`, `expected`, `text`; without these three the summary's `answer` is shown.
        predictions: examples to show, rows of predictions.jsonl (`choose_examples`).
        corpus: rows of the corpus table (`licence_rows`), all with the same keys.
        failures: clips and questions that were set aside.
    """
    page = render(
        "run.html",
        title=title,
        lead=_lead(summary),
        cards=_cards(summary),
        scene=_scene(scene, summary.get("answer")) if scene else None,
        accuracy=_accuracy(details) if details else None,
        captions=_captions((details or {}).get("captions")),
        clap=_clap(summary.get("clap")),
        losses=plots.losses(losses, TITLES) if any(losses.values()) else None,
        stages=summary.get("stages") or None,
        padding=plots.padding(summary["stages"]) if summary.get("stages") else None,
        examples=list(predictions),
        corpus=_corpus(summary.get("corpus"), corpus),
        failures=_failures(failures),
        footer=_footer(summary),
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


def _lead(summary: Mapping[str, Any]) -> str:
    parts = ["Real recordings, small models, every link of the chain"]
    if summary.get("total_s"):
        parts.append(f"in {summary['total_s'] / 60:.0f} minutes")
    if summary.get("peak_rss_gib"):
        parts.append(f"and {summary['peak_rss_gib']:.1f} GiB of memory")
    return " ".join(parts) + "."


def _cards(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    cards: list[dict[str, str]] = []
    if accuracy := summary.get("accuracy"):
        controls = {
            name: accuracy[key]
            for name, key in (("deaf", "deaf"), ("majority", "majority"), ("text only", "text_only"))
            if accuracy.get(key) is not None
        }
        cards.append(
            _card(f"{percent(accuracy['all'])} %", "right answers", f"{accuracy['questions']} unseen questions")
        )
        if controls:
            best = max(controls, key=lambda name: controls[name])
            low, high = accuracy["ci95"]
            lead = 100 * (accuracy["all"] - controls[best])
            note = f"over {best} ({percent(controls[best])} %); 95 % {100 * low:+.1f} to {100 * high:+.1f}"
            cards.append(_card(f"{lead:+.1f}", "points above the best control", note))
        if accuracy.get("pairs") is not None:
            cards.append(_card(f"{percent(accuracy['pairs'])} %", "pairs with both right", "same words, two clips"))
        if accuracy.get("seen_clips") is not None:
            cards.append(_card(f"{percent(accuracy['seen_clips'])} %", "on training clips", "in scenes that are new"))
    if clap := summary.get("clap"):
        times = clap["t2a_r1"] / clap["t2a_r1_chance"]
        note = f"text to audio among {clap['gallery']}; {times:.0f} times chance"
        cards.append(_card(f"{percent(clap['t2a_r1'])} %", "AF-CLAP R@1", note))
        if clap.get("order_accuracy") is not None:
            cards.append(
                _card(f"{percent(clap['order_accuracy'])} %", "order recognised", "mirrored scenes; chance 50 %")
            )
    return cards


def _card(value: str, label: str, note: str) -> dict[str, str]:
    return {"value": value, "label": label, "note": note}


def _scene(scene: Mapping[str, Any], answer: Mapping[str, Any] | None) -> dict[str, Any]:
    duration_s = float(scene["duration_s"])
    mono = decode(str(scene["uri"]), 0.0, duration_s)
    exchange = scene if scene.get("question") else (answer or {})
    count = len(scene["events"])
    return {
        "svg": draw_scene(mono, scene["events"], duration_s),
        "audio": _audio_uri(mono) if duration_s <= _MOST_AUDIO_S else None,
        "note": f"{duration_s:.0f} seconds, {count} event{'s' if count != 1 else ''} at the places marked.",
        "question": exchange.get("question"),
        "expected": exchange.get("expected"),
        "text": exchange.get("text"),
        "right": normalise_answer(str(exchange.get("text", ""))) == normalise_answer(str(exchange.get("expected", ""))),
    }


def _audio_uri(mono: NDArray[np.floating]) -> str:
    buffer = io.BytesIO()
    sf.write(buffer, mono, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(buffer.getvalue()).decode()


_CONTROL_KEYS = ("pairs", "deaf", "majority", "text_only", "chance")


def _accuracy(details: Mapping[str, Any]) -> dict[str, Any]:
    durations = {f"{name.replace('<=', '≤ ')} s": row for name, row in details["by_duration"].items()}
    named = [("all", details["all"]), *details["by_skill"].items(), *durations.items()]
    if len(benchmarks := details.get("by_benchmark", {})) > 1:
        named += [(name, row["all"]) for name, row in benchmarks.items() if "all" in row]
    if details.get("seen"):
        named.append(("new scenes of training clips", details["seen"]))
    blank = dict.fromkeys(_CONTROL_KEYS)
    return {
        "by_skill": plots.accuracies(details["by_skill"], "accuracy by skill"),
        "by_duration": plots.accuracies(durations, "accuracy by duration"),
        "rows": [blank | dict(row) | {"name": name} for name, row in named],
    }


def _captions(row: Mapping[str, Any] | None) -> str | None:
    if not row or row["event_f1"] is None:
        return None
    text = f"Captions ({row['captions']}) are scored apart: event F1 {row['event_f1']:.2f}"
    if row.get("deaf_event_f1") is not None:
        text += f" (deaf {row['deaf_event_f1']:.2f})"
    return text + f", all events named and no other in {percent(row['same_events'])} %."


def _clap(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not row:
        return None
    keys = ("t2a_r5", "t2a_r10", "a2t_r1", "a2t_r5", "a2t_r10", "order_accuracy", "order_pairs")
    return dict.fromkeys(keys) | dict(row)


def _corpus(facts: Mapping[str, Any] | None, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not facts and not rows:
        return None
    note = ""
    if facts:
        note = (
            f"{facts['source_clips']} source clips of {facts['classes']} classes, {facts['hours']:.1f} hours of "
            f"composed scenes; training and test share no source clip. SHA-256 {str(facts['sha256'])[:16]}."
        )
    columns = list(rows[0]) if rows else []
    numeric = {key for key in columns if all(isinstance(row[key], int | float) for row in rows)}
    return {"note": note, "rows": rows, "columns": columns, "numeric": numeric}


def _failures(failures: Sequence[Failure]) -> list[dict[str, Any]]:
    counts = Counter(failure.reason for failure in failures)
    first = {failure.reason: failure.uri for failure in reversed(failures)}
    return [{"reason": reason, "count": count, "example": first[reason]} for reason, count in counts.most_common()]


def _footer(summary: Mapping[str, Any]) -> str:
    parts = ["Made by af2_ray"]
    if summary.get("mlflow_runs"):
        parts.append(f"{summary['mlflow_runs']} MLflow runs")
    parts.append("every number is in summary.json and evaluation/metrics.json beside this page")
    return "; ".join(parts) + "."
