"""What a sweep says: a table of points with intervals, plots, and the best recipe.

Beside the metric stand its parts (skills, lengths of clip, kinds of relation) and the evaluation's other measures.
Two points are compared seed by seed and question by question, over the seeds that both have, so a difference is free of
what seeds and questions share; its interval is over both (`evaluate.intervals`). Trials that were stopped early have no
score and only appear in the table.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from af2_ray.config import Recipe, Sweep
from af2_ray.evaluate.intervals import interval95
from af2_ray.evaluate.items import ItemResult, read_items
from af2_ray.evaluate.report import plots
from af2_ray.evaluate.report.page import render
from af2_ray.tune.trial import Result, items_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One combination of values over its seeds.

    Attributes:
        values: values of the point, by recipe key.
        trials: number of its trials, one a seed.
        done: number of those that reached their end.
        mean: mean of the metric over seeds; none if no trial of the point reached its end.
        ci95: interval of that; with one seed it is over questions alone.
        above: difference to the baseline (the first point) over the seeds that both have.
        above_ci95: interval of that.
    """

    values: dict[str, Any]
    trials: int
    done: int
    mean: float | None
    ci95: tuple[float, float] | None
    above: float | None
    above_ci95: tuple[float, float] | None


def summarise(
    results: Sequence[Result], items: Mapping[str, Sequence[ItemResult]], metric: str, group: str | None = None
) -> list[Point]:
    """The points of a sweep in order, with intervals.

    Args:
        results: trials of the sweep.
        items: results item by item of each trial's evaluation, by its id.
        metric: name of the sweep's metric, or of another measure of the items.
        group: name of the one group whose items count; none: all.
    """
    order = sorted({result.point for result in results})
    done = [result for result in results if result.status == "done" and result.metric is not None]
    scores, units = _scores(done, items, metric, group)
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
    done: Sequence[Result], items: Mapping[str, Sequence[ItemResult]], metric: str, group: str | None
) -> tuple[dict[int, dict[int, NDArray[np.float64]]], NDArray[np.int64]]:
    """Point -> seed -> values of the items that all trials have, and what is resampled together."""
    found = {
        result.id: {
            each.item: each
            for each in items.get(result.id, ())
            if each.measure == metric and (group is None or group in each.groups)
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


def parts_of(items: Mapping[str, Sequence[ItemResult]], metric: str) -> list[tuple[str, str | None]]:
    """What there is beside the metric itself: its groups, then the other measures, as (measure, group)."""
    every = [item for each in items.values() for item in each]
    groups = {(metric, group): None for item in every if item.measure == metric for group in item.groups}
    others = {(item.measure, None): None for item in every if item.measure != metric}
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
        root: folder of the sweep.
        sweep: settings of the sweep.
        results: trials, ended or stopped.
        folders: folders of the trials, by id.
        recipes: recipes of the trials, by id, as they are outside the sweep, which has its own MLflow and features.
    """
    items = {result.id: read_items(items_path(folders[result.id])) for result in results}
    points = summarise(results, items, sweep.metric)
    parts = parts_of(items, sweep.metric)
    keys = list(sweep.keys)
    _csv(root / "trials.csv", results)
    _csv(root / "points.csv", points)
    winner = best(results, points, sweep.metric)
    if winner is not None:
        text = recipes[winner.id].to_yaml()
        (root / "best.yaml").write_text(f"# Best of sweep {sweep.name}: {winner.values}, seed {winner.seed}.\n{text}")
    path = root / "report.html"
    path.write_text(
        render(
            "sweep.html",
            title=f"Sweep {sweep.name}",
            verdict=verdict(points, sweep.metric),
            points=points,
            names=[_name(point.values) for point in points],
            parts=[(group or measure, summarise(results, items, measure, group)) for measure, group in parts],
            pictures=[(key, plots.points(_levels(points, key), key, sweep.metric)) for key in keys],
            parallel=plots.parallel([(each.values, each.metric) for each in results], keys, sweep.metric),
            keys=keys,
            trials=results,
            best=winner,
            folders=folders,
            recipe=root / "best.yaml",
        ),
        encoding="utf-8",
    )
    return path


def verdict(points: Sequence[Point], metric: str) -> str:
    """What the intervals allow to say, in one sentence."""
    compared = [point for point in points if point.above_ci95 is not None]
    if not compared:
        return "Too few trials have ended to compare points."
    apart = [p for p in compared if p.above_ci95 and (p.above_ci95[0] > 0 or p.above_ci95[1] < 0)]
    names = "; ".join(f"{_name(p.values)} {p.above:+.3f}" for p in apart)
    rest = len(compared) - len(apart)
    resolved = (
        f"Differs from {_name(points[0].values)} in {metric}, beyond its 95 % interval: {names}. " if apart else ""
    )
    seeds = "One seed: intervals are over questions alone. " if all(p.done == 1 for p in compared) else ""
    return seeds + resolved + (f"Not resolved at this size: {rest} of {len(compared)} points." if rest else "")


def _name(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in values.items())


def _csv(path: Path, found: Sequence[Result | Point]) -> None:
    """A row each, a column for each of the sweep's keys."""
    rows = [{key: value for key, value in (asdict(one) | one.values).items() if key != "values"} for one in found]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def _levels(points: Sequence[Point], key: str) -> dict[str, list[tuple[float, tuple[float, float]]]]:
    """Means and intervals of the points of each value of a key."""
    levels: dict[str, list[tuple[float, tuple[float, float]]]] = {}
    for point in points:
        level = levels.setdefault(str(point.values[key]), [])
        if point.mean is not None and point.ci95 is not None:
            level.append((point.mean, point.ci95))
    return levels
