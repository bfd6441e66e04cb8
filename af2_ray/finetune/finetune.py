"""One fine-tuning, whole: scores before, training, scores after on the same questions, and what changed.

What is finished is skipped, so the same command goes on after an interruption.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from af2_ray.evaluate.answers import Prediction
from af2_ray.evaluate.paired import Comparison, compare
from af2_ray.finetune.data import write_parts
from af2_ray.finetune.plan import Planned
from af2_ray.finetune.scores import answers
from af2_ray.runs.run import Run
from af2_ray.runs.tracking import Tracker
from af2_ray.storage.files import read_rows, write_whole
from af2_ray.train.stages import Watch, assemble, train_run

Heading = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a fine-tuning came to.

    Attributes:
        facts: contents of finetune.json.
        comparisons: the questions of the new test, and of the old one where there is any, by name.
        validation: pairs (step, loss) of the looks at the validation recordings.
    """

    facts: dict[str, Any]
    comparisons: dict[str, Comparison]
    validation: tuple[tuple[int, float], ...]

    @property
    def kept_step(self) -> int | None:
        """Step whose weights were exported; none: the last."""
        step: int | None = self.facts["kept_step"]
        return step


def finetune(run: Run, planned: Planned, *, watch: Watch, heading: Heading) -> Outcome:
    """Bring a fine-tuning to its end; needs a connected Ray cluster and the run's lock.

    Args:
        run: run of the planned recipe.
        watch: context around each step, as `stages.train_run` takes it.
        heading: function that shows what is done next.
    """
    parts, (stage,) = planned.parts, run.recipe.stages
    write_parts(parts, planned.place)  # only now: the directory may have held a run of another start
    questions = [*parts.test, *parts.old_test]
    heading("scores before")
    before = answers(run, "before", run.address(assemble(run)), questions, stage)
    (training,) = train_run(run, watch=watch)
    heading("scores after")
    after = answers(run, "after", run.address(run.model_dir), questions, stage)
    comparisons = {"test": _compared(before, after, parts.test)}
    if parts.old_test:
        comparisons["old test"] = _compared(before, after, parts.old_test)
    rows = read_rows(run.stage_dir(stage.name) / "validation.jsonl")
    validation = {int(row["step"]): float(row["val/own"]) for row in rows if "val/own" in row}
    best = min(validation, key=lambda step: (validation[step], step), default=None)
    facts = {
        "model": planned.recipe.model.start,
        "recipe": {"name": planned.choice.recipe, "reason": planned.choice.reason},
        "data": parts.counts(),
        "remarks": list(parts.remarks),
        "training": training,
        "kept_step": best if stage.export == "best" else None,
        **{name.replace(" ", "_"): comparison.to_json() for name, comparison in comparisons.items()},
    }
    write_whole(run.root / "finetune.json", json.dumps(facts, indent=1))
    _track(run, facts)
    run.keep()
    return Outcome(facts, comparisons, tuple(sorted(validation.items())))


def _compared(before: list[Prediction], after: list[Prediction], samples: Any) -> Comparison:
    mine = {id(sample) for sample in samples}
    return compare([one for one in before if id(one.sample) in mine], [one for one in after if id(one.sample) in mine])


def _track(run: Run, facts: dict[str, Any]) -> None:
    tracker = Tracker(run)
    child = tracker.child("comparison", {"model": facts["model"]})
    scores = {
        f"{name}/{key}": facts[name]["all"][key]
        for name in ("test", "old_test")
        if name in facts and facts[name]["all"]
        for key in ("before", "after", "change")
    }
    tracker.log_history(child, [{"step": 0, **scores}])
    tracker.finish("comparison")
