"""Make a whole model folder of a base and a small part of it: the same files as the export beside the part.

python jobs/merge.py models/af2-3b runs/mine/stages/finetune/part --out models/mine
"""

from __future__ import annotations

from collections.abc import Sequence

from af2_ray import console


def main(argv: Sequence[str] | None = None) -> None:
    """Merge, and print where to."""
    parser = console.parser(__doc__, recipe=False)
    parser.add_argument("base", metavar="BASE", help="model that the part was trained from: folder, or s3:// address")
    parser.add_argument("part", metavar="PART", help="folder `part` beside a stage's export, or its s3:// address")
    parser.add_argument("--out", required=True, help="new folder for the whole model, or an s3:// address")
    arguments = parser.parse_args(argv)
    from af2_ray.models.parts import merge  # heavy imports after the arguments are checked

    merge(arguments.base, arguments.part, arguments.out)
    console.console.print(arguments.out, markup=False)


if __name__ == "__main__":
    console.main(main)
