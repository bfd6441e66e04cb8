"""What a sweep says: a table of points with intervals, plots, and the best recipe.

Beside the metric stand its parts (skills, lengths of clip, kinds of relation) and the evaluation's other measures.
Two points are compared seed by seed and question by question, over the seeds that both have, so a difference is free of
what seeds and questions share; its interval is over both (`evaluate.intervals`). Trials that were stopped early have no
score and only appear in the table.
"""

from __future__ import annotations

import csv
import html
import io
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from af2_ray.config import Recipe, Sweep
from af2_ray.evaluate.intervals import interval95
from af2_ray.evaluate.marks import Mark, read_marks
from af2_ray.tune.trial import Result, marks_path

logger = logging.getLogger(__name__)

INK, MODEL, FAINT = "#26323b", "#1f6f78", "#c3ccd1"
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#26323b}"
    "svg{width:100%;height:auto}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #e4e2db}"
    "td:first-child,th:first-child{text-align:left}"
)


@dataclass(frozen=True)
class Point:
    """One combination of values over its seeds.

    Attributes:
        mean: of the metric over seeds; none if no trial of the point reached its end.
        ci95: its interval. above: how far it is above the baseline (the first point) over the seeds that both have.
        above_ci95: the interval of that. With one seed an interval is over questions alone.
    """

    values: dict[str, Any]
    trials: int
    done: int
    mean: float | None
    ci95: tuple[float, float] | None
    above: float | None
    above_ci95: tuple[float, float] | None


def summarise(
    results: Sequence[Result], marks: Mapping[str, Sequence[Mark]], metric: str, group: str | None = None
) -> list[Point]:
    """The points of a sweep in order, with intervals.

    Args:
        marks: of each trial's evaluation, by its id.
        metric: the sweep's, or another measure of the marks.
        group: only marks of this group.
    """
    order = sorted({result.point for result in results})
    done = [result for result in results if result.status == "done" and result.metric is not None]
    scores, units = _scores(done, marks, metric, group)
    points = []
    for point in order:
        members = [result for result in results if result.point == point]
        mine, base = scores.get(point, {}), scores.get(order[0], {})
        common = sorted(set(mine) & set(base)) if point != order[0] else []
        values = np.array([mine[seed] for seed in sorted(mine)])
        above = np.array([mine[seed] - base[seed] for seed in common])
        points.append(
            Point(
                values=members[0].values,
                trials=len(members),
                done=len(mine),
                mean=float(values.mean()) if mine else None,
                ci95=interval95(values, units) if mine else None,
                above=float(above.mean()) if common else None,
                above_ci95=interval95(above, units) if common else None,
            )
        )
    return points


def _scores(
    done: Sequence[Result], marks: Mapping[str, Sequence[Mark]], metric: str, group: str | None
) -> tuple[dict[int, dict[int, NDArray[np.float64]]], NDArray[np.int64]]:
    """Point -> seed -> values of the items that all trials have, and what is resampled together."""
    found = {
        result.id: {
            mark.item: mark
            for mark in marks.get(result.id, ())
            if mark.measure == metric and (group is None or group in mark.groups)
        }
        for result in done
    }
    common = sorted(set.intersection(*(set(each) for each in found.values()))) if found else []
    scores: dict[int, dict[int, NDArray[np.float64]]] = {}
    if not common and any(found.values()):
        logger.warning("%s: no item of it was evaluated in all trials: they cannot be compared by it", group or metric)
        return scores, np.zeros(0, np.int64)
    for result in done:
        assert result.metric is not None, "a trial that is done has its metric"
        values = np.array([found[result.id][item].right for item in common] or [result.metric])
        scores.setdefault(result.point, {})[result.seed] = values
    units = [found[done[0].id][item].unit for item in common] if common else ["one"]
    return scores, np.unique(units, return_inverse=True)[1]


def parts_of(marks: Mapping[str, Sequence[Mark]], metric: str) -> list[tuple[str, str | None]]:
    """What there is beside the metric itself: its groups, then the other measures, as (measure, group)."""
    every = [mark for each in marks.values() for mark in each]
    groups = {(metric, group): None for mark in every if mark.measure == metric for group in mark.groups}
    others = {(mark.measure, None): None for mark in every if mark.measure != metric}
    return [*sorted(groups, key=_by_number), *others]


def _by_number(part: tuple[str, str]) -> tuple[bool, int, str]:
    """Lengths from short to long, then names."""
    number = re.search(r"\d+", part[1])
    starts = 0 if part[1].startswith("<") or number is None else int(number[0])
    return (number is None, starts, part[1])


def best(results: Sequence[Result], points: Sequence[Point], metric: str) -> Result | None:
    """The best trial of the best point by its mean, of those with most seeds done; none if no trial reached its end."""
    sign = -1 if metric == "loss" else 1
    order = sorted({result.point for result in results})
    scored = [
        (point.done, sign * point.mean, number)
        for number, point in zip(order, points, strict=True)
        if point.mean is not None
    ]
    if not scored:
        return None
    number = max(scored, key=lambda item: item[:2])[-1]  # of equal ones the first
    members = [r for r in results if r.point == number and r.status == "done" and r.metric is not None]
    return max(members, key=lambda result: sign * (result.metric or 0.0))


def write_report(
    root: Path, sweep: Sweep, results: Sequence[Result], folders: Mapping[str, Path], recipes: Mapping[str, Recipe]
) -> Path:
    """Write `trials.csv`, `points.csv`, `best.yaml` and `report.html`; returns the page.

    Args:
        folders: of the trials, by id.
        recipes: of the trials as they are outside the sweep, which has its own MLflow and features.
    """
    marks = {result.id: read_marks(marks_path(folders[result.id])) for result in results}
    points = summarise(results, marks, sweep.metric)
    parts_found = [(part, summarise(results, marks, *part)) for part in parts_of(marks, sweep.metric)]
    keys = list(sweep.keys)
    _csv(root / "trials.csv", [{**asdict(r), **r.values} for r in results], drop=("values",))
    _csv(root / "points.csv", [{**asdict(p), **p.values} for p in points], drop=("values",))
    winner = best(results, points, sweep.metric)
    if winner is not None:
        text = recipes[winner.id].to_yaml()
        (root / "best.yaml").write_text(f"# Best of sweep {sweep.name}: {winner.values}, seed {winner.seed}.\n{text}")
    parts = [f"<!doctype html><meta charset=utf-8><title>sweep {sweep.name}</title><style>{STYLE}</style>"]
    parts += [
        f"<h1>Sweep {sweep.name}</h1><p>{html.escape(verdict(points, sweep.metric))}</p>",
        _points_table(points, keys),
    ]
    if parts_found:
        told = "In brackets: above the first point, and its 95 % interval."
        parts += [f"<h2>By part, and other measures</h2><p>{told}</p>", _parts_table(points, parts_found)]
    parts += [_key_plot(points, key, sweep.metric) for key in keys]
    parts += [f"<h2>All trials</h2>{_parallel(results, keys, sweep.metric)}{_trials_table(results, keys)}"]
    if winner is not None:
        command = f"jobs/train.py {root / 'best.yaml'} --run DIR --fork {folders[winner.id]}"
        parts.append(
            f"<p>Best: trial {winner.id}, <code>{folders[winner.id]}</code>. <code>{html.escape(command)}</code> makes "
            "a run of it; without <code>--fork</code> all is trained anew, shared steps with this trial's seed.</p>"
        )
    path = root / "report.html"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def verdict(points: Sequence[Point], metric: str) -> str:
    """What the intervals allow to say, in one sentence."""
    told = [point for point in points if point.above_ci95 is not None]
    if not told:
        return "Too few trials have ended to compare points."
    apart = [p for p in told if p.above_ci95 and (p.above_ci95[0] > 0 or p.above_ci95[1] < 0)]
    names = "; ".join(f"{_name(p.values)} {p.above:+.3f}" for p in apart)
    rest = len(told) - len(apart)
    resolved = (
        f"Differs from {_name(points[0].values)} in {metric}, beyond its 95 % interval: {names}. " if apart else ""
    )
    seeds = "One seed: intervals are over questions alone. " if all(p.done == 1 for p in told) else ""
    return seeds + resolved + (f"Not resolved at this size: {rest} of {len(told)} points." if rest else "")


def _name(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in values.items())


def _csv(path: Path, rows: list[dict[str, Any]], drop: Sequence[str]) -> None:
    rows = [{key: value for key, value in row.items() if key not in drop} for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def _points_table(points: Sequence[Point], keys: Sequence[str]) -> str:
    rows = [
        [*(str(p.values[key]) for key in keys), f"{p.done} of {p.trials}", _number(p.mean), _range(p.ci95, ""),
         _number(p.above, "+"), _range(p.above_ci95)]
        for p in points
    ]  # fmt: skip
    return _table([*keys, "seeds done", "mean", "95 %", "above the first", "95 %"], rows)


def _parts_table(points: Sequence[Point], parts: Sequence[tuple[tuple[str, str | None], Sequence[Point]]]) -> str:
    """A row a part: the first point's mean, then each other point's and how far it is above, with its interval."""
    rows = []
    for (measure, group), found in parts:
        cells = [group or measure]
        for point in found:
            cells.append(_number(point.mean))
            if point.above_ci95:
                cells[-1] += f" ({_number(point.above, '+')}; {_range(point.above_ci95)})"
        rows.append(cells)
    return _table(["", *(_name(point.values) for point in points)], rows)


def _trials_table(results: Sequence[Result], keys: Sequence[str]) -> str:
    rows = [
        [
            r.id,
            *(str(r.values[key]) for key in keys),
            r.status,
            _number(r.metric),
            _number(r.loss),
            str(r.steps),
            f"{r.seconds:.0f}",
        ]
        for r in results
    ]
    return _table(["trial", *keys, "status", "metric", "loss", "steps", "seconds"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(each)}</th>" for each in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(each)}</td>" for each in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def _number(value: float | None, sign: Literal["", "+"] = "") -> str:
    return "–" if value is None else f"{value:{sign}.4f}"


def _range(pair: tuple[float, float] | None, sign: Literal["", "+"] = "+") -> str:
    return "–" if pair is None else f"{pair[0]:{sign}.4f} to {pair[1]:{sign}.4f}"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _key_plot(points: Sequence[Point], key: str, metric: str) -> str:
    """The metric against one key: a dot and its interval for each point."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.add_subplot()
    values = list(dict.fromkeys(str(point.values[key]) for point in points))
    for point in points:
        if point.mean is not None and point.ci95 is not None:
            beside = [p for p in points if p.values[key] == point.values[key]]
            place = values.index(str(point.values[key])) + 0.06 * (beside.index(point) - (len(beside) - 1) / 2)
            axes.plot([place, place], point.ci95, color=INK, linewidth=1.2)
            axes.plot(place, point.mean, "o", color=MODEL)
    axes.set_xticks(range(len(values)), values)
    axes.set_xlabel(key)
    axes.set_ylabel(metric)
    axes.spines[["top", "right"]].set_visible(False)
    return f"<h2>{html.escape(key)}</h2>{_svg(figure)}"


def _parallel(results: Sequence[Result], keys: Sequence[str], metric: str) -> str:
    """Parallel coordinates: a line a trial through its values to its metric; faint if unfinished."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    levels = {key: list(dict.fromkeys(str(result.values[key]) for result in results)) for key in keys}
    found = [result.metric for result in results if result.metric is not None]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    for result in results:
        line = [levels[key].index(str(result.values[key])) / max(1, len(levels[key]) - 1) for key in keys]
        if result.metric is None:
            axes.plot(range(len(keys)), line, color=FAINT, linewidth=0.8, marker=".")
            continue
        share = (result.metric - low) / (high - low) if high > low else 0.5
        good = 1 - share if metric == "loss" else share
        axes.plot(range(len(keys) + 1), [*line, share], color=MODEL, alpha=0.2 + 0.8 * good, linewidth=1.4)
    for place, key in enumerate(keys):
        for number, value in enumerate(levels[key]):
            axes.annotate(
                value, (place, number / max(1, len(levels[key]) - 1)), textcoords="offset points", xytext=(4, 3)
            )
    for share in (0.0, 1.0):
        text = f"{low + share * (high - low):.3f}"
        axes.annotate(text, (len(keys), share), textcoords="offset points", xytext=(4, 3))
    axes.set_xticks(range(len(keys) + 1), [*keys, metric])
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    return _svg(figure)
