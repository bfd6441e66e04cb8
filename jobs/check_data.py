"""Look at a blend before a GPU is asked for: counts, hours, lengths, unreadable files, duplicates, leakage.

    python jobs/check_data.py tiny                                  # all manifests that a recipe names
    python jobs/check_data.py mine/train.json --test mine/test.json

Writes check_data.html. Exit code 0 if nothing stands against training, 1 if something does, 2 for input that cannot be
used. File headers are read unless --files 0; --files 1000 reads those of a thousand files drawn from each manifest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.markup import escape

from af2_ray import console
from af2_ray.config import Dataset, Faults, load_recipe, parse_columns, recipe_names
from af2_ray.data.data_check import Survey, faults, leakage, shorten, survey
from af2_ray.storage.places import allow, shown


def main(argv: Sequence[str] | None = None) -> None:
    """Print what is there and what stands against it, and write the page."""
    args = _arguments(argv)
    datasets, max_bad_share = _datasets(args)
    most = None if args.files < 0 else args.files
    surveys = [survey(one.dataset, one.split, most_probed=most, max_windows=one.max_windows) for one in datasets]
    found = faults(surveys, max_bad_share)
    write = partial(console.console.print, soft_wrap=True)
    for line in _lines(surveys):
        write(line, markup=False)
    for line in found:
        write(f"[bold red]fault:[/] {escape(line)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(surveys, found), encoding="utf-8")
    write(f"{'no' if not found else len(found)} fault{'s' if len(found) != 1 else ''}; plots are in {args.out}")
    if found:
        sys.exit(console.EXIT_FAILED)


class Asked(NamedTuple):
    """A manifest, its split, and how many windows of a clip are heard by whom."""

    dataset: Dataset
    split: str
    max_windows: dict[str, int]


def _datasets(args: argparse.Namespace) -> tuple[list[Asked], float]:
    """Manifests, each once, and the share of bad samples put up with."""
    found: dict[tuple[str, str], Dataset] = {}
    hearers: dict[tuple[str, str], dict[str, int]] = {}
    columns = parse_columns(args.columns)
    max_bad_share = Faults().max_bad_share
    for name in args.inputs:
        if name in recipe_names() or name.endswith((".yaml", ".yml")):
            recipe = load_recipe(name)
            allow(recipe.access.schemes, parents=recipe.access.parents)
            max_bad_share = recipe.faults.max_bad_share
            for stage in recipe.stages:
                found |= {(dataset.manifest, "train"): dataset for dataset in stage.data}
                for dataset in stage.data:
                    hearers.setdefault((dataset.manifest, "train"), {})[f"stage {stage.name}"] = stage.max_windows
            for dataset in recipe.evaluation.manifests:
                found[dataset.manifest, "test"] = dataset
                hearers[dataset.manifest, "test"] = {"the evaluation": recipe.evaluation.max_windows}
        else:
            found[name, "train"] = Dataset(manifest=name, root=args.root, columns=columns)
    found |= {(name, "test"): Dataset(manifest=name, root=args.root, columns=columns) for name in args.test}
    asked = [Asked(dataset, split, hearers.get((name, split), {})) for (name, split), dataset in found.items()]
    return asked, max_bad_share


HEADINGS = ("samples", "clips", "hours", "median s", "words", "set aside", "unreadable", "twice")
WIDTHS = (10, 10, 10, 9, 6, 10, 18, 6)  # 79 in all: the lines fit 80 columns, however long a manifest's name is


def _row(one: Survey) -> list[str]:
    return [
        f"{one.num_samples:,}",
        f"{one.num_clips:,}",
        f"{one.hours:.2f}",
        f"{np.median(one.duration_s):.1f}" if one.duration_s else "-",
        f"{np.median(one.text_words):.0f}" if one.text_words else "-",
        f"{sum(one.set_aside.values()):,}",
        f"{len(one.unreadable):,} of {one.num_probed:,}",
        f"{len(one.duplicates):,}",
    ]


def _title(one: Survey) -> str:
    return f"{one.manifest} ({one.split}" + (f", weight {one.weight:g})" if one.split == "train" else ")")


def _lines(surveys: Sequence[Survey]) -> Iterator[str]:
    """Headings once; for each manifest its name, and its figures below."""
    yield _aligned(HEADINGS)
    for one in surveys:
        yield _title(one)
        yield _aligned(_row(one))
        yield from (f"  {shown(remark)}" for remark in shorten(one.remarks, 5))


def _aligned(cells: Sequence[str]) -> str:
    return "".join(cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))


def page(surveys: Sequence[Survey], found: Sequence[str]) -> str:
    """The report: one HTML file with everything in it."""
    from af2_ray.evaluate.report import plots
    from af2_ray.evaluate.report.page import render  # matplotlib takes a second: after the arguments are checked

    leaked = leakage(surveys)
    pictures = [
        plots.histograms({"seconds a clip": one.duration_s, "words a sample": one.text_words}, ["seconds a clip"])
        for one in surveys
    ]
    return render(
        "data_check.html",
        title="Data check",
        faults=found,
        manifests=(["manifest", *HEADINGS], [[_title(one), *_row(one)] for one in surveys]),
        surveys=[
            {"name": one.manifest, "picture": picture, "lists": [part for part in _lists(one) if part[1]]}
            for one, picture in zip(surveys, pictures, strict=True)
        ],
        leaked=("in training and in test", len(leaked), shorten(leaked)) if leaked else None,
    )


def _lists(one: Survey) -> Iterator[tuple[str, int, list[str]]]:
    """Headings, numbers of lines, and the first of these."""
    unreadable = [f"{shown(uri)}: {reason}" for uri, reason in one.unreadable.items()]
    set_aside = [f"{reason}: {count}" for reason, count in one.set_aside.items()]
    yield "remarks", len(one.remarks), shorten(one.remarks)
    yield "set aside", len(set_aside), shorten(set_aside)
    yield "unreadable", len(unreadable), shorten(unreadable)
    yield "asked twice", len(one.duplicates), shorten(one.duplicates)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.parser(__doc__, recipe=False)
    parser.add_argument("inputs", metavar="RECIPE|MANIFEST", nargs="+", help="a recipe, or training manifests")
    parser.add_argument("--test", metavar="MANIFEST", nargs="+", default=[], help="manifests that must not leak")
    parser.add_argument("--root", help="folder of the audio (default: each manifest's own)")
    parser.add_argument(
        "--columns",
        default="",
        metavar="KEY=COLUMN,...",
        help="columns by our keys, if named otherwise: audio=path,question=q,answer=a",
    )
    parser.add_argument("--files", type=int, default=-1, help="headers read of each manifest (-1: all)")
    parser.add_argument("--out", type=Path, default=Path("check_data.html"), help="the page (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    console.main(main)
