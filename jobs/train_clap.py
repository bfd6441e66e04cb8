"""Train a recipe's AF-CLAP alone: two towers from audio and caption sets, the audio one for the curriculum.

    python jobs/train_clap.py tiny
    python jobs/train_clap.py tiny corpus=null 'clap.captions=[{manifest: mine/train.captions.jsonl}]' \
        clap.warmup_captions=[] clap.warmup_steps=0 --run runs/mine

The model is in <run>/clap/model; `model.audio.weights=<run>/clap/model` makes another recipe hear with it, and
`jobs/train.py` on the same run directory goes on from it.
"""

from __future__ import annotations

from collections.abc import Sequence

from af2_ray import console
from af2_ray.config import load_recipe
from af2_ray.runs.run import Run


def main(argv: Sequence[str] | None = None) -> None:
    """Train AF-CLAP, and show how far it is."""
    parser = console.parser(__doc__)
    parser.add_argument(
        "--run", metavar="DIR", help="run directory, or its s3:// address; default: <storage>/<name> of the recipe"
    )
    arguments = parser.parse_args(argv)
    from af2_ray.cluster import preflight  # heavy imports after the arguments are checked
    from af2_ray.runs.tracking import Tracker
    from af2_ray.train.stage_clap import train_clap

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.clap is None:
        raise ValueError(f"recipe {recipe.name!r} has no clap block")
    run = Run.open(recipe, arguments.run)
    with run.lock(), console.logs_to(run.root / "logs" / "train_clap.log"):
        if recipe.corpus is not None:
            console.corpus(recipe.corpus)
        with console.cluster(run.root / "logs"), console.watch("AF-CLAP", run.clap_dir, recipe.clap.steps):
            preflight(recipe.cluster)
            tracker = Tracker(run)
            with tracker.closing():
                tracker.parent()
                facts = train_clap(run, tracker)
                tracker.finish("parent")
    console.console.print(f"loss {facts['loss_first']:.3f} -> {facts['loss_last']:.3f}")
    console.console.print(f"model: {run.address(run.clap_dir / 'model')}")


if __name__ == "__main__":
    console.main(main)
