"""Recipes from YAML: bases, overrides, and errors that name the key and the nearest right one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from af2_ray.config.recipe import Recipe

RECIPE_DIR = Path(__file__).parent.parent / "recipes"


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-4` as a number (YAML 1.1 wants `1.0e-4`) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"key {key!r} is given twice (line {key_node.start_mark.line + 1})")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPE_DIR.glob("*.yaml"))


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides.

    Args:
        name: a shipped recipe's name (`tiny`) or the path of a YAML file.
        overrides: `dotted.key=value` strings; values are YAML; an item of a list is named by its index or its
            `name` (`stages.pretrain.steps=5`).

    Raises:
        ValueError: no such recipe, a bad key or a bad value; the message names the key and the nearest right one.
    """
    path = _find(name)
    raw = _read(path)
    for override in overrides:
        _override(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{path}:\n" + "\n".join(_explain(item) for item in error.errors())) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping; what cannot be read, or is no mapping, is a `ValueError` that names the file."""
    try:
        raw = yaml.load(path.read_text(), Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not readable: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: should be a mapping of keys to values, got {type(raw).__name__}")
    return raw


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file as a mapping, laid over the recipe it names as its `base`, if any."""
    if path in seen:
        raise ValueError(f"{path}: is its own base")
    raw = read_yaml(path)
    base = raw.pop("base", None)
    return raw if base is None else merge(_read(_find(base), (*seen, path)), raw)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, block by block; lists and values are replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _find(name: str | Path) -> Path:
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return path
        raise ValueError(f"no recipe file {path}")
    shipped = RECIPE_DIR / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    near = difflib.get_close_matches(str(name), recipe_names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no recipe {str(name)!r}{hint} (shipped: {', '.join(recipe_names())}; or give a .yaml file)")


def _override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key of the raw mapping in place."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r}: write it as key=value, for instance stages.pretrain.steps=5")
    target: Any = raw
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        if isinstance(target, list):
            target = target[_list_index(target, part, key)]
        else:
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
        if not isinstance(target, dict | list):
            raise ValueError(f"override {key!r}: {'.'.join(parents[: depth + 1])!r} is a value, not a block of keys")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not YAML; quote it, or close its brackets") from error
    if isinstance(target, list):
        target[_list_index(target, last, key)] = value
    else:
        target[last] = value


def _list_index(items: list[Any], part: str, key: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = [name for name in names if name] or f"0 to {len(items) - 1}"
    raise ValueError(f"override {key!r}: no item {part!r} in the list; it has {known}")


def _explain(item: Any) -> str:
    """One pydantic error as one line: the key, what is wrong, the nearest right key."""
    key = ".".join(str(part) for part in item["loc"]) or "recipe"
    if item["type"] == "extra_forbidden":
        known = _keys_at(Recipe, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"  {key}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"  {key}: missing"
    message = item["msg"].removeprefix("Value error, ")
    got = "" if isinstance(item["input"], dict | list) else f" (got {item['input']!r})"
    return f"  {key}: {message}{got}"


def _keys_at(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Field names of the settings block at `path`."""
    for part in path:
        if isinstance(part, int):
            continue
        nested = _block_of(model.model_fields[part].annotation)
        if nested is None:
            return []
        model = nested
    return list(model.model_fields)


def _block_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if block := _block_of(argument):
            return block
    return None
