"""Make a recipe's corpus: source clips, scenes, questions, caption sets. What is finished is not made again."""

from __future__ import annotations

import json
import logging

import fsspec
from rich.logging import RichHandler

from af2_ray import console
from af2_ray.config import load_recipe
from af2_ray.synth.corpus import make_corpus


def main() -> None:
    """Read the recipe, make its corpus, say what is in it."""
    parser = console.parser(
        __doc__ or "",
        epilog="examples:\n  python jobs/make_data.py tiny\n  python jobs/make_data.py tiny corpus.sources=rendered "
        "corpus.dir=data/rendered\n  python jobs/make_data.py tiny corpus.sources=my/sounds corpus.dir=data/mine",
    )
    arguments = parser.parse_args()
    handler = RichHandler(console=console.console, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.corpus is None:
        raise ValueError(f"recipe {recipe.name!r} has no corpus block: its data is made elsewhere")
    console.heading("corpus")
    total = sum(scenes.num_scenes for scenes in recipe.corpus.sets)
    with console.bar("scenes", total) as update:
        report = make_corpus(recipe.corpus, progress=lambda done, _, what: update(done, what))
    with fsspec.open(f"{recipe.corpus.dir.rstrip('/')}/sources/done.json", "rt") as file:
        made = json.load(file)
    console.console.print(
        f"{report.num_source_clips} source clips of {report.num_classes} classes ({', '.join(made['classes'])})"
    )
    console.console.print(f"{report.hours:.1f} h of scenes in {report.dir}, sha256 {report.sha256[:16]}")


if __name__ == "__main__":
    console.main(main)
