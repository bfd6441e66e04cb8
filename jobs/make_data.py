"""Make a recipe's corpus: source clips, scenes, questions, caption sets. What is finished is not made again."""

from __future__ import annotations

import json
from collections.abc import Sequence

from af2_ray import console
from af2_ray.config import load_recipe
from af2_ray.storage.places import allow, open_text


def main(argv: Sequence[str] | None = None) -> None:
    """Read the recipe, make its corpus, say what is in it."""
    parser = console.parser(
        __doc__,
        epilog="examples:\n  python jobs/make_data.py tiny\n  python jobs/make_data.py tiny corpus.sources=rendered "
        "corpus.dir=data/rendered\n  python jobs/make_data.py tiny corpus.sources=my/sounds corpus.dir=data/mine",
    )
    arguments = parser.parse_args(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    allow(recipe.access.schemes, parents=recipe.access.parents)
    if recipe.corpus is None:
        raise ValueError(f"recipe {recipe.name!r} has no corpus block: its data is made elsewhere")
    report = console.corpus(recipe.corpus)
    with open_text(f"{recipe.corpus.dir.rstrip('/')}/sources/done.json") as file:
        made = json.load(file)
    console.console.print(f"classes: {', '.join(made['classes'])}\nsha256 {report.sha256[:16]}")


if __name__ == "__main__":
    console.main(main)
