"""Fine-tune a model on your own audio: check the data, score, train, score again, and say what changed.

    python jobs/finetune.py runs/demo/stages/long/model my_sounds                     # a folder of label/clip.*
    python jobs/finetune.py MODEL train.json --test test.json --replay old/train.json --old-test old/test.json

The same command goes on after an interruption. Recordings are held out for validation where none are given; the weights
with the least loss on them are kept.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from af2_ray import console
from af2_ray.config import Dataset, parse_columns

if TYPE_CHECKING:
    from af2_ray.finetune.plan import Planned
    from af2_ray.runs.run import Run

PARTS = {
    "validation": "held-out recordings, which choose the best checkpoint (default: a tenth of TRAIN's)",
    "test": "questions that are asked before and after (default: those of validation)",
    "replay": "older training data that is mixed in",
    "old-test": "older questions, which show what is forgotten (default: a part of what is replayed)",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune, and print the outcome."""
    args = _arguments(argv)
    from af2_ray.cluster import preflight  # heavy imports after the arguments are checked
    from af2_ray.finetune.data import Sources
    from af2_ray.finetune.finetune import finetune
    from af2_ray.finetune.page import write_page
    from af2_ray.finetune.plan import Request, plan
    from af2_ray.runs.run import Run

    columns = parse_columns(args.columns)
    parts = ("train", "validation", "test", "replay", "old_test")
    given = {
        name: [Dataset(manifest=uri, root=args.root, columns=columns) for uri in getattr(args, name)] for name in parts
    }
    planned = plan(
        Request(
            model=args.model,
            sources=Sources(**given),
            run=args.run,
            recipe=args.recipe,
            overrides=tuple(args.overrides),
            replay_share=args.replay_share,
            cut_audio=args.cut_audio,
        )
    )
    write = console.console.print
    write(f"recipe {planned.choice.recipe}: {planned.choice.reason}", markup=False)
    console.check_tracking(planned.recipe)
    run = Run.open(planned.recipe, planned.place)
    with run.lock(), console.logs_to(run.root / "logs" / "finetune.log"):
        write(_data_table(planned.parts.counts()))
        for remark in planned.parts.remarks:
            write(remark, markup=False)
        console.disk(planned.recipe, run)
        with console.cluster(run.root / "logs"):
            preflight(planned.recipe.cluster)
            outcome = finetune(run, planned, watch=console.watch, heading=console.heading)
        page = write_page(run, outcome)
    console.heading("outcome")
    for name, comparison in outcome.comparisons.items():
        write(console.comparison(name, comparison))
    _say_what_next(run, planned, page)


def _data_table(rows: Sequence[dict[str, object]]) -> console.Table:
    table = console.table("part", "samples", "recordings", "minutes", "set aside", title="data")
    for row in rows:
        aside = row["set_aside"]
        assert isinstance(aside, dict)
        reasons = ", ".join(f"{reason} {count}" for reason, count in aside.items())
        table.add_row(str(row["part"]), *(f"{row[key]:,}" for key in ("samples", "recordings", "minutes")), reasons)
    return table


def _say_what_next(run: Run, planned: Planned, page: Path) -> None:
    """Where everything is, and the commands to ask the model and to serve it."""
    model = shlex.quote(run.address(run.model_dir))
    sample = planned.parts.test[0]
    for line in (
        f"\nmodel:  {run.address(run.model_dir)}",
        f"report: {run.address(page)}",
        f"data:   {run.address(run.root / 'data')}",
        "\nask it:",
        f"  python jobs/ask.py {model} {shlex.quote(sample.uri)} {shlex.quote(sample.prompt)}",
        "serve it:",
        f"  serve run serve_apps.af2:app model={model}",
    ):
        console.console.print(line, markup=False, soft_wrap=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.parser(__doc__, recipe=False, epilog="options for data may be given several times")
    add = parser.add_argument
    add("model", metavar="MODEL", help="model to start from: an export's folder, s3:// address, or a name on the hub")
    add("train", metavar="TRAIN", help="manifest of any format, or a folder of label/clip.*")
    add("overrides", nargs="*", metavar="key=value", help="of the recipe, for instance stages.finetune.steps=50")
    add(
        "--validation",
        metavar="MANIFEST",
        action="append",
        default=[],
        help="held-out data that chooses the best checkpoint",
    )
    add("--replay-share", type=float, default=0.5, help="share of the training that is replayed (%(default)s)")
    add("--run", metavar="DIR", help="run directory or s3:// address (default: <storage>/finetune-<name of TRAIN>)")
    add("--recipe", help="recipe of one stage (default: a shipped one, chosen by model and machine)")
    add("--root", help="folder of the audio (default: each manifest's own)")
    add("--columns", default="", help="columns of a table, as audio=path,question=q,answer=a")
    add("--cut-audio", action="store_true", help="hear only the beginning of recordings that are too long")
    return parser.parse_args(argv)


if __name__ == "__main__":
    console.main(main)
