"""One self-contained page that shows a fine-tuning: what it changed, question by question, how it learned, on what.

The recordings of the shown questions are in it, too, each cut after half a minute: thirty of them take at most some
seven megabytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from af2_ray.audio.decode import AudioError, decode
from af2_ray.audio.hear import Stretch
from af2_ray.evaluate.answers import question_words
from af2_ray.evaluate.paired import ChangedAnswer, Comparison, PairedRow
from af2_ray.evaluate.report import plots
from af2_ray.evaluate.report.page import audio_uri, percent, render
from af2_ray.storage.files import write_whole
from af2_ray.storage.places import shown

_MOST_AUDIO_S = 30.0
_HEADINGS = ("", "questions", "before", "after", "change", "95 %", "better", "worse", "chance")


def write_finetune_report(
    path: str | Path,
    *,
    title: str,
    facts: Mapping[str, Any],
    comparisons: Mapping[str, Comparison | None],
    losses: plots.Curve = (),
    validation: plots.Curve = (),
    kept_step: int | None = None,
    counts: Sequence[Mapping[str, Any]] = (),
    set_aside: Sequence[str] = (),
) -> None:
    """Write the page; a part whose facts are missing is left out.

    Args:
        path: name of the HTML file; its folder is made.
        title: heading of the page.
        facts: start model, recipe, numbers of samples, seconds and the like, as they are to be read.
        comparisons: answers before and after by the name of the test (`test`, `old test`), in order; none: not asked.
        losses: pairs (step, loss) of training.
        validation: pairs (step, loss) of validation.
        kept_step: step whose weights were kept.
        counts: rows of the data's table, all with the same keys: numbers of samples, clips, hours of each manifest.
        set_aside: lines that say what was set aside and why.
    """
    known = {name: found for name, found in comparisons.items() if found is not None}
    page = render(
        "finetune.html",
        title=title,
        facts=facts,
        tests=[_test(name, found) for name, found in known.items()],
        learning=plots.learning(losses, validation, kept_step) if losses or validation else None,
        kept=_kept(validation, kept_step),
        counts=counts,
        set_aside=set_aside,
    )
    write_whole(Path(path), page)


def _test(name: str, found: Comparison) -> dict[str, Any]:
    """One test, as the template shows it."""
    durations = {f"{band.replace('<=', '≤ ')} s": row for band, row in found.by_duration.items()}
    rows = {"all": found.all, **found.by_skill, **durations} if found.all else {}
    parts = {"By skill": found.by_skill, "By duration": durations}
    kinds = (
        ("answers that became right", ("missed", "answer"), found.better),
        ("answers that became wrong", ("answer", "missed"), found.worse),
        ("captions that changed", ("", ""), found.rewritten),
    )
    return {
        "name": name,
        "all": found.all,
        "pictures": [(part, plots.changes(own, f"{name} {part}")) for part, own in parts.items() if own],
        "table": (_HEADINGS, [_cells(label, row) for label, row in rows.items()]),
        "captions": found.captions,
        "alone": (("before", found.only_before), ("after", found.only_after)),
        "examples": [(kind, looks, list(map(_example, answers))) for kind, looks, answers in kinds if answers],
    }


def _cells(name: str, row: PairedRow) -> list[str]:
    shares = [percent(row.before), percent(row.after), f"{100 * row.change:+.1f}", interval(row)]
    return [shown(name), str(row.questions), *shares, str(row.better), str(row.worse), percent(row.chance)]


def interval(row: PairedRow) -> str:
    """The interval of the change in points; a dash for none."""
    return "–" if row.change_ci95 is None else "{:+.1f} to {:+.1f}".format(*(100 * end for end in row.change_ci95))


def _example(answer: ChangedAnswer) -> dict[str, Any]:
    sample = answer.sample
    return {
        "skill": sample.skill,
        "history": sample.history,
        "question": question_words(sample),
        "options": sample.options,
        "expected": sample.answer,
        "before": answer.before,
        "after": answer.after,
        "players": list(map(_player, sample.stretches)),
    }


def _player(stretch: Stretch) -> dict[str, Any]:
    """A recording's name, length and player, or why there is none."""
    heard_s = min(stretch.duration_s, _MOST_AUDIO_S)
    name = shown(stretch.uri.rsplit("/", 1)[-1])
    length = f"{stretch.duration_s:.1f} s"
    if heard_s < stretch.duration_s:
        length = f"the first {heard_s:.0f} of {stretch.duration_s:.0f} s"
    try:
        audio = audio_uri(decode(stretch.uri, stretch.offset_s, heard_s), "ogg")
    except AudioError as error:
        return {"name": name, "length": f"cannot be read: {error.reason}", "audio": None}
    return {"name": name, "length": length, "audio": audio}


def _kept(validation: plots.Curve, kept_step: int | None) -> str:
    """Which checkpoint was kept, in a sentence; empty where that is not known."""
    if kept_step is None:
        return ""
    loss = dict(validation).get(kept_step)
    return f"Kept: the weights of step {kept_step}" + (f", validation loss {loss:.3f}." if loss is not None else ".")
