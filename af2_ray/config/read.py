"""Recipes from YAML: bases, overrides, and errors that name the key and the nearest right one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from af2_ray.config.recipe import Recipe

SettingsT = TypeVar("SettingsT", bound=BaseModel)

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
    return yaml_names(RECIPE_DIR)


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides.

    Args:
        name: a shipped recipe's name (`tiny`) or the path of a YAML file.
        overrides: `dotted.key=value` strings; values are YAML; an item of a list is named by its index or its
            `name` (`stages.pretrain.steps=5`).

    Raises:
        ValueError: no such recipe, a bad key or a bad value; the message names the key and the nearest right one.
    """
    path = find_yaml(name, RECIPE_DIR, "recipe")
    raw = _read(path)
    for override in overrides:
        _override(raw, override)
    return checked(Recipe, raw, path)


def yaml_names(folder: Path) -> list[str]:
    """Names of the YAML files of a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_yaml(name: str | Path, folder: Path, kind: str) -> Path:
    """A YAML file by its path, or by its name if it is one of those that ship in `folder`.

    Raises:
        ValueError: no such file; the message calls it by its `kind`, and names the nearest that ships.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return path
        raise ValueError(f"no {kind} file {path}")
    shipped = folder / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    names = yaml_names(folder)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no {kind} {str(name)!r}{hint} (shipped: {', '.join(names)}; or give a .yaml file)")


def checked(settings: type[SettingsT], raw: dict[str, Any], path: Path) -> SettingsT:
    """The settings that a file has; `ValueError` names the file, each bad key and the nearest right one."""
    try:
        return settings.model_validate(raw)
    except ValidationError as error:
        faults = "\n".join(_explain(item, settings) for item in error.errors())
        raise ValueError(f"{path}:\n{faults}") from error


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
    return raw if base is None else merge(_read(find_yaml(base, RECIPE_DIR, "recipe"), (*seen, path)), raw)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, block by block; lists and values are replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key of the raw mapping in place."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r}: write it as key=value, for instance stages.pretrain.steps=5")
    target: Any = raw
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
        target = target[_place(target, part, key)]
        if not isinstance(target, dict | list):
            raise ValueError(f"override {key!r}: {'.'.join(parents[: depth + 1])!r} is a value, not a block of keys")
    try:
        target[_place(target, last, key)] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not YAML; quote it, or close its brackets") from error


def _place(block: dict[str, Any] | list[Any], part: str, key: str) -> str | int:
    """Where a block has what a part of a key names: of a list, the index of the item."""
    if isinstance(block, dict):
        return part
    names = [item.get("name") if isinstance(item, dict) else None for item in block]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(block):
        return int(part)
    known = [name for name in names if name] or f"0 to {len(block) - 1}"
    raise ValueError(f"override {key!r}: no item {part!r} in the list; it has {known}")


def _explain(item: Any, settings: type[BaseModel]) -> str:
    """One pydantic error as one line: the key, what is wrong, the nearest right key."""
    key = ".".join(str(part) for part in item["loc"]) or settings.__name__.lower()
    if item["type"] == "extra_forbidden":
        known = _keys_at(settings, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"  {key}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"  {key}: missing"
    message = item["msg"].removeprefix("Value error, ")
    got = "" if isinstance(item["input"], dict | list) else f" (got {item['input']!r})"
    return f"  {key}: {message}{got}"


def _keys_at(settings: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Field names of the settings block at `path`."""
    for part in path:
        if isinstance(part, str):
            settings = next(_blocks_of(settings.model_fields[part].annotation))
    return list(settings.model_fields)


def _blocks_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings blocks that a key's type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _blocks_of(argument)
