"""Train a recipe from its first step to its last: corpus, language model, AF-CLAP, curriculum stages.

What is finished is skipped; what was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from af2_ray import console
from af2_ray.config import load_recipe
from af2_ray.runs.run import Run


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and show how far it is."""
    parser = console.parser(
        __doc__,
        epilog="examples:\n  python jobs/train.py tiny\n"
        "  python jobs/train.py tiny stages.pretrain.steps=20 --run runs/try\n"
        "  ray job submit --runtime-env runtime_env.yaml -- python jobs/train.py tiny storage=/shared/runs\n"
        "  python jobs/train.py tiny data=s3://bucket/data storage=s3://bucket/runs",
    )
    parser.add_argument(
        "--run", metavar="DIR", help="run directory, or its s3:// address; default: <storage>/<name> of the recipe"
    )
    parser.add_argument(
        "--fork", metavar="DIR", help="start --run with the finished steps of this run that the recipe leaves valid"
    )
    arguments = parser.parse_args(argv)
    from af2_ray.cluster import preflight  # heavy imports after the arguments are checked
    from af2_ray.runs.fork import fork
    from af2_ray.train.stages import train_run

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    console.check_tracking(recipe)
    if arguments.fork and arguments.run and not (Path(arguments.run) / "recipe.yaml").exists():
        run, taken = fork(recipe, arguments.fork, arguments.run)
        console.console.print(f"forked from {arguments.fork}: {', '.join(taken) or 'no finished step'} taken over")
    elif arguments.fork and not arguments.run:
        raise ValueError("--fork needs --run: the directory of the new run")
    else:
        run = Run.open(recipe, arguments.run)
    with run.lock(), console.logs_to(run.root / "logs" / "train.log"):
        console.disk(recipe, run)
        if recipe.corpus is not None:
            console.corpus(recipe.corpus)
        with console.cluster(run.root / "logs"):
            preflight(recipe.cluster)
            for facts in train_run(run, watch=console.watch):
                if "loss_last" in facts:
                    change = f"loss {facts['loss_first']:.3f} -> {facts['loss_last']:.3f}"
                    console.console.print(f"{facts['name']:>10}  {facts['steps']} steps  {change}")
    console.console.print(f"model: {run.address(run.model_dir)}")


if __name__ == "__main__":
    console.main(main)
