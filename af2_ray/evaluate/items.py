"""Results item by item: what an interval is drawn from, whether it was right, and what it is resampled with.

Written beside an evaluation as `marks.jsonl`, so that runs are compared item by item long after they have ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from af2_ray.data.samples import CaptionSet
from af2_ray.evaluate.answers import Prediction, groups_of, is_caption
from af2_ray.evaluate.intervals import question_units
from af2_ray.evaluate.table import Labelled


@dataclass(frozen=True)
class ItemResult:
    """One item: a question, a mirrored pair of clips, a query.

    Attributes:
        measure: name of what it is an item of: `accuracy`, `composition`, `t2a_r1`, `t2a_r1_reworded`, `a2t_r1`,
            `zero_shot`.
        item: name of it, unique within its measure, the same in all runs on the same data.
        unit: name that items share which are right or wrong together (all of one recording, or a pair).
        right: 0 or 1.
        groups: parts of the measure it belongs to: a skill, a duration band, a kind of relation, a wording.
    """

    measure: str
    item: str
    unit: str
    right: float
    groups: tuple[str, ...] = ()


def clip_result(measure: str, clip: CaptionSet | Labelled, right: float, *groups: str, part: str = "") -> ItemResult:
    """The result of a clip, or of a part of what is asked about it; the clip's results are one unit."""
    unit = f"{clip.uri}#{clip.offset_s}"
    return ItemResult(measure, f"{unit} {part}" if part else unit, unit, right, groups)


def answer_results(predictions: Iterable[Prediction]) -> list[ItemResult]:
    """Results of the closed questions, grouped by duration band and skill."""
    closed = [prediction for prediction in predictions if not is_caption(prediction.sample)]
    names = [f"{prediction.sample.uri}#{prediction.sample.id}" for prediction in closed]
    units = question_units([prediction.sample for prediction in closed])
    return [
        ItemResult("accuracy", name, str(unit), float(one.right), (f"{groups['duration']} s", groups["skill"]))
        for one, name, unit in zip(closed, names, units.tolist(), strict=True)
        for groups in [groups_of(one.sample)]
    ]


def share_right(items: Sequence[ItemResult], measure: str) -> float:
    """Share of right items of a measure; `ValueError` if there are none."""
    rights = [item.right for item in items if item.measure == measure]
    if not rights:
        raise ValueError(f"nothing was evaluated of {measure!r}: the data hold no item of it")
    return sum(rights) / len(rights)


def write_items(path: Path, items: Sequence[ItemResult]) -> None:
    """A line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items), encoding="utf-8")


def read_items(path: Path) -> list[ItemResult]:
    """What `write_items` wrote; empty if there is no such file."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [ItemResult(**{**row, "groups": tuple(row["groups"])}) for row in rows]
