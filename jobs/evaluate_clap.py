"""Score an AF-CLAP folder on captions and labels: retrieval, composition, zero-shot classes.

    python jobs/evaluate_clap.py runs/demo/clap/model data/demo/clap/test.captions.jsonl
    python jobs/evaluate_clap.py runs/mine/clap/model ESC-50/meta/esc50.csv clotho/clotho_captions_evaluation.csv

Captions: JSON lines, Parquet and the rest of the manifests, or the CSV of AudioCaps or Clotho. Labels: the CSV of
ESC-50 or UrbanSound8K, or any with a file name and a label, or the truth of composed scenes (`test.scenes.jsonl`). All
figures go to OUT as JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from af2_ray import console
from af2_ray.console import percent

write = console.console.print


def main(argv: Sequence[str] | None = None) -> None:
    """Score each file, print its figures, write all of them."""
    args = _arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from af2_ray.evaluate.clap_embed import TEMPLATES, ClapModel, ClapSettings
    from af2_ray.evaluate.evaluate import evaluate_clap  # heavy imports after the arguments are checked

    results = {}
    settings = ClapSettings(args.max_windows, args.batch_windows, args.gallery, args.template or TEMPLATES)
    clap = ClapModel.load(args.model, settings)
    for uri in args.data:
        scores = evaluate_clap(clap, uri, args.root)
        console.heading(uri)
        _show(scores.figures)
        if failures := scores.failures:
            write(f"set aside: {len(failures)}, for instance {failures[0].uri}: {failures[0].reason}", markup=False)
        results[uri] = scores.figures | {"failures": [asdict(failure) for failure in failures]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write(f"all figures are in {args.out}")


def _show(result: dict[str, Any]) -> None:
    if "top1" in result:
        _show_classes(result)
    else:
        write(f"{result['gallery']} clips, {result['captions']} captions; %")
        for way, title in (("t2a", "text to audio"), ("a2t", "audio to text")):
            scores = ", ".join(f"{key.upper()} {percent(result[f'{way}_{key}'])}" for key in ("r1", "r5", "r10"))
            write(f"{title}: {scores}, mAP@10 {percent(result[f'{way}_map10'])}")
        write(f"alignment {result['alignment']}, uniformity {result['uniformity']}")
        for kind, row in result["choice"].items():
            both = f"both right {percent(row['both'])} (chance 25.0)"
            if "both_reworded" in row:
                both += f", in other words {percent(row['both_reworded'])}"
            write(f"choice by {kind}: {percent(row['accuracy'])} (chance 50.0), {both}, {row['pairs']} pairs")
        if negatives := result.get("negatives"):
            kinds = ", ".join(f"{kind} {percent(share)}" for kind, share in negatives["by_kind"].items())
            write(f"over each negative: {percent(negatives['each'])}, over all: {percent(negatives['all'])}")
            write(f"by kind of negative: {kinds}") if kinds else None
        if classes := result.get("zero_shot"):
            _show_classes(classes)


def _show_classes(row: dict[str, Any]) -> None:
    top = f"top-1 {percent(row['top1'])} (chance {percent(row['top1_chance'])})"
    write(f"zero-shot, {row['clips']} clips, {row['classes']} classes: {top}, mAP {percent(row['map'])}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.parser(__doc__, recipe=False)
    parser.add_argument("model", metavar="MODEL", help="AF-CLAP folder, local or s3://: a run's `clap/model`")
    parser.add_argument("data", metavar="DATA", nargs="+", help="captions or a CSV of labels")
    parser.add_argument("--root", help="folder of the audio (default: by the layout, or the file's own)")
    parser.add_argument("--gallery", type=int, help="clips in the retrieval (default: all)")
    parser.add_argument(
        "--template", action="append", help='of a class name, for instance "the sound of {}"; repeatable'
    )
    parser.add_argument("--max-windows", type=int, default=1, help="10 s windows heard of a clip (%(default)s)")
    parser.add_argument("--batch-windows", type=int, default=32, help="windows encoded at a time (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("evaluation/clap.json"), help="results (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    console.main(main)
