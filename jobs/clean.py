"""Show what of a run can go without a finished step being lost, and remove it when asked.

That is: checkpoints of finished steps and damaged ones, features of finished stages, what a kill left half written.

    python jobs/clean.py runs/tiny
    python jobs/clean.py runs/tiny --remove
"""

from __future__ import annotations

from collections.abc import Sequence

from af2_ray import console
from af2_ray.runs.run import Run


def main(argv: Sequence[str] | None = None) -> None:
    """Show, or remove."""
    parser = console.parser(__doc__, recipe=False)
    parser.add_argument("run", metavar="RUN", help="run directory, or its s3:// address")
    parser.add_argument("--remove", action="store_true", help="remove what is shown")
    arguments = parser.parse_args(argv)
    from af2_ray.train.disk import amount, remove, spare  # heavy imports after the arguments are checked

    run = Run.load(arguments.run)
    found = spare(run)
    if not found:
        console.console.print("nothing of this run can go")
        return
    if arguments.remove:
        with run.lock():  # nobody works in it; and what a kill has left is gone with it
            remove(found)
    total = amount(sum(one.size for one in found))
    for one in found:
        console.console.print(f"{amount(one.size):>10}  {one.why}\n{'':>12}{one.path}", markup=False)
    console.console.print(f"{total} removed" if arguments.remove else f"{total} can go: add --remove")


if __name__ == "__main__":
    console.main(main)
