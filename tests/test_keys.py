"""Every key of a recipe is read by some job: by the code that the job imports, however far away."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from af2_ray.config import Recipe

ROOT = Path(__file__).parents[1]
ENTRIES = {path.stem: path for path in sorted((ROOT / "jobs").glob("*.py"))} | {"serve": ROOT / "serve_apps/af2.py"}


READ_BY = {"licences": "licence_of"}  # a method of the settings that reads the key


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Paths of all keys that are no blocks themselves."""
    for name, field in model.model_fields.items():
        blocks = list(blocks_of(field.annotation))
        if not blocks:
            yield f"{prefix}{name}"
        for block in blocks:
            yield from leaves(block, f"{prefix}{name}.")


def blocks_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from blocks_of(argument)


@functools.cache
def module_facts(path: Path) -> tuple[frozenset[str], frozenset[Path]]:
    """Attributes that a module reads, and the files of this project that it imports, within functions too."""
    names, files = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("af2_ray", "serve_apps")):
            for module in (str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)):
                base = ROOT / module.replace(".", "/")
                files |= {file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()}
    return frozenset(names), frozenset(files)


def attributes_of(entry: Path) -> frozenset[str]:
    """Attributes read by a job and all that it imports, but for the settings' own modules."""
    seen: set[Path] = set()
    waiting = [entry]
    names: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or (ROOT / "af2_ray/config") in path.parents:
            continue
        seen.add(path)
        read, imported = module_facts(path)
        names |= read
        waiting += imported
    return frozenset(names)


@pytest.fixture(scope="module")
def readers() -> dict[str, list[str]]:
    """Jobs that read each key."""
    read = {name: attributes_of(path) for name, path in ENTRIES.items()}
    return {
        leaf: [name for name, attributes in read.items() if READ_BY.get(leaf, leaf.rsplit(".", 1)[-1]) in attributes]
        for leaf in dict.fromkeys(leaves(Recipe))
    }


def test_every_key_is_read(readers: dict[str, list[str]]) -> None:
    assert len(readers) > 150
    assert [leaf for leaf, jobs in readers.items() if not jobs] == []


@pytest.mark.parametrize(
    ("leaf", "jobs"),
    [
        ("model.max_text_tokens", {"train", "ask", "evaluate", "infer", "serve"}),
        ("cluster.threads_per_worker", {"train", "evaluate"}),
        ("serve.num_slots", {"infer", "serve"}),
        ("stages.z_loss", {"train", "probe"}),
        ("clap.every_positive", {"train", "train_clap"}),
    ],
)
def test_a_key_reaches_who_needs_it(readers: dict[str, list[str]], leaf: str, jobs: set[str]) -> None:
    assert jobs <= set(readers[leaf])
