"""Score an exported model on manifests: predictions as JSON lines, metrics by benchmark, skill and duration.

    python jobs/evaluate.py runs/tiny/stages/long/model data/demo/short/test.json --train data/demo/short/train.json

Beside the model stands what it must beat: itself with another clip (deaf) and, with --train, the majority answer and a
classifier on the text alone.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from af2_ray import console
from af2_ray.config import Cluster, Dataset, Evaluation, parse_columns
from af2_ray.storage.places import shown

MOST_LETTERS = 14  # of a row's name: the table fits 80 columns


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, and print the table."""
    args = _arguments(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
    columns = parse_columns(args.columns)
    evaluation = Evaluation(
        manifests=[Dataset(manifest=manifest, root=args.root, columns=columns) for manifest in args.manifests],
        max_windows=args.max_windows,
        batch_windows=args.batch_windows,
        max_new_tokens=args.max_new_tokens,
    )
    result = _evaluate(evaluation, args)
    console.console.print(_table(result.details))
    for line in _closing_lines(result, args.out):
        console.console.print(line)


def _evaluate(evaluation: Evaluation, args: argparse.Namespace) -> Any:
    from af2_ray.evaluate.evaluate import evaluate_run  # heavy imports after the arguments are checked

    columns = parse_columns(args.columns)
    train = [Dataset(manifest=manifest, root=args.root, columns=columns) for manifest in args.train]
    if not args.shards:
        return evaluate_run(args.model, evaluation, train=train, out_dir=args.out)
    with console.cluster(args.out / "logs"):
        workers = Cluster(num_workers=args.shards)
        return evaluate_run(args.model, evaluation, train=train, out_dir=args.out, cluster=workers)


def _table(details: dict[str, Any]) -> Table:
    headings = ("asked", "model", "95 %", "pairs", "deaf", "majority", "text\nonly", "chance")
    table = console.table("", *headings, title="right answers, %")
    benchmarks = details.get("by_benchmark", {})
    sections = [
        {"all": details["all"]} if "all" in details else {},
        {name: row["all"] for name, row in benchmarks.items() if "all" in row} if len(benchmarks) > 1 else {},
        details["by_skill"],
        {f"{band} s": row for band, row in details["by_duration"].items()},
    ]
    for section in sections:
        for name, row in section.items():
            low, high = row["ci95"]["model"]
            controls = [_percent(row.get(key)) for key in ("pairs", "deaf", "majority", "text_only", "chance")]
            interval = f"{_percent(low)}-{_percent(high)}"
            table.add_row(
                _shortened(name, [*section]), str(row["questions"]), _percent(row["model"]), interval, *controls
            )
        table.add_section()
    return table


def _shortened(name: str, names: Sequence[str]) -> str:
    """A row's name, of a long one the part that tells it from the others of its section."""
    if len(name) <= MOST_LETTERS:
        return name
    parts = [other.split("/") for other in names if len(other) > MOST_LETTERS]
    same = next((place for place, column in enumerate(zip(*parts, strict=False)) if len({*column}) > 1), 0)
    rest = "/".join(name.split("/")[same:])
    return f"…{rest[: MOST_LETTERS - 1]}" if same else f"{rest[: MOST_LETTERS - 1]}…"


def _closing_lines(result: Any, out: Path) -> list[str]:
    row, lines = result.details.get("all", {}), []
    if "best_control" in row:
        low, high = row["above_best_control_ci95"]
        lead = 100 * row["above_best_control"]
        lines.append(f"{lead:+.1f} points over {row['best_control']} (95 %: {100 * low:+.1f} to {100 * high:+.1f})")
    if captions := result.details.get("captions"):
        lines.append(f"captions: {captions['captions']}, event F1 {captions['event_f1']}")
    if result.failures:
        first = result.failures[0]
        lines.append(f"set aside: {len(result.failures)}, for instance {shown(first.uri)}: {first.reason}")
    return [*lines, f"predictions.jsonl and metrics.json are in {out}"]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.parser(__doc__, recipe=False)
    parser.add_argument("model", metavar="MODEL", help="exported model: a stage's `model` folder, local or s3://")
    parser.add_argument("manifests", metavar="MANIFEST", nargs="+", help="manifest of any format")
    parser.add_argument("--train", metavar="MANIFEST", nargs="+", default=[], help="fit the text controls on these")
    parser.add_argument("--root", help="folder of the audio (default: each manifest's own)")
    parser.add_argument(
        "--columns",
        default="",
        metavar="KEY=COLUMN,...",
        help="columns by our keys, if named otherwise: audio=path,question=q,answer=a",
    )
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder of the results (%(default)s)")
    parser.add_argument("--shards", type=int, default=0, help="spread over this many Ray actors; 0: this process alone")
    parser.add_argument("--max-windows", type=int, default=30, help="10 s windows heard of a clip (%(default)s)")
    parser.add_argument("--batch-windows", type=int, default=32, help="windows encoded at a time (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="length limit of an answer (%(default)s)")
    parser.add_argument("--verbose", action="store_true", help="say what is being done")
    return parser.parse_args(argv)


if __name__ == "__main__":
    console.main(main)
