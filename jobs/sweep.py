"""Run a recipe many times with different keys and seeds, and say what the difference is worth.

Trials run side by side on Ray Tune, as many as the cluster holds; what they have in common (language model, audio
tower) is made once where the sweep says so. Ended trials are skipped and interrupted ones go on, so the same command
after a kill loses nothing. Writes trials.csv, points.csv, report.html and best.yaml, a recipe ready to run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from af2_ray import console
from af2_ray.config import load_sweep, sweep_names
from af2_ray.storage.places import allow


def main(argv: Sequence[str] | None = None) -> None:
    """Run the trials that are left, and write the report."""
    arguments = _arguments(argv)
    sweep = load_sweep(arguments.sweep)
    trials = sweep.trials(arguments.overrides)  # every combination is checked before anything starts
    recipe = trials[0].recipe
    for trial in trials:
        allow(trial.recipe.access.schemes, parents=trial.recipe.access.parents)  # before Ray starts its workers
    if arguments.list:
        for trial in trials:
            console.console.print(f"{trial.id}  {trial.values}")
        return
    out = arguments.out or f"{recipe.storage}/sweeps/{sweep.name}"
    if "://" in out:
        raise ValueError(f"{out}: a sweep is written on a shared file system; give its path")
    root = Path(out)
    os.environ |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_DISABLE_SIGINT_HANDLER": "1"}  # Ctrl-C is no success
    from af2_ray.tune.report import write_report  # Ray Tune reads its environment when it is imported
    from af2_ray.tune.sweep import SweepRun

    console.check_tracking(recipe)
    run = SweepRun(sweep, root, arguments.overrides)
    with console.logs_to(run.root / "logs" / "sweep.log"):
        if recipe.corpus is not None:
            console.corpus(recipe.corpus)
        with console.cluster(run.root / "logs"):
            console.heading(f"sweep {sweep.name}: {len(trials)} trials")
            results = run.run(notify=lambda text: console.console.print(text, markup=False))
        folders = {trial.id: run.folder(trial) for trial in run.trials}
        report = write_report(run.root, sweep, results, folders, {trial.id: trial.recipe for trial in trials})
    console.console.print(f"report: {report}")
    failed = [result for result in results if result.status == "failed"]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(trials)} trials failed, first {failed[0].id}: {failed[0].error}; "
            "the same command runs them again"
        )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.parser(
        __doc__,
        epilog="examples:\n  python jobs/sweep.py frequency --list\n"
        "  python jobs/sweep.py frequency --out runs/frequency\n"
        "  python jobs/sweep.py my_sweep.yaml cluster.num_workers=4",
        recipe=False,
    )
    parser.add_argument("sweep", help=f"a shipped sweep ({', '.join(sweep_names())}) or a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, for all trials")
    parser.add_argument("--out", metavar="DIR", help="folder of the sweep (default: <storage>/sweeps/<name>)")
    parser.add_argument("--list", action="store_true", help="only name the trials")
    return parser.parse_args(argv)


if __name__ == "__main__":
    console.main(main)
