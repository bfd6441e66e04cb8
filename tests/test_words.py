"""The words of the project: each argument, attribute and setting is described by a noun, each reference can be opened.

A description that begins with a preposition or a verb ("of blend and order") leaves the reader to guess what the thing
is. The first word is compared with lists of words that seldom begin a right description: a mistake that is not listed
passes, and a right sentence that is refused can say the same in other words.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PREPOSITIONS = """about above across after against along among around as at before behind below beneath beside between
beyond by down during except for from in inside into like near of off on onto out outside over past per since through
to toward under until up upon via with within without"""
CONJUNCTIONS = "also although always and because but if nor only or so than though unless when which while whose"
VERBS = """added are ask asks be called can chosen computed do does done drawn get gets give given gives has have hear
heard hears is it keep keeps kept launches made make makes may must pad read reads recompute say says send sends
should sets starts take taken takes tell tells told uses wait waits was were write writes"""
REFUSED = {*PREPOSITIONS.split(), *CONJUNCTIONS.split(), *VERBS.split()}
SECTIONS = ("Args:", "Attributes:")
CLOSED_DOCUMENTS = "|".join(("PAP" + "ER", "GOLD" + "EN", "DES" + "IGN"))


def files(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in suffixes:
                yield path


def documented(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Line, counted from the docstring's first, and text of each entry of its `Args:` and `Attributes:`."""
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return
    inside = False
    for number, line in enumerate((ast.get_docstring(node) or "").splitlines()):
        if not line.startswith(" ") and line:
            inside = line in SECTIONS
        elif inside and (entry := re.fullmatch(r" {4}(?! )[*\w][\w, *]*: *(.+)", line)):
            yield number, entry[1]


def described(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of the `description` of a pydantic field."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Field":
        for keyword in node.keywords:
            if keyword.arg == "description" and isinstance(keyword.value, ast.Constant):
                yield keyword.value.lineno, str(keyword.value.value)


def faults(source: str) -> list[tuple[int, str]]:
    """Lines of a module at which a description does not begin with a noun, and those descriptions."""
    entries = []
    for node in ast.walk(ast.parse(source)):
        entries += described(node)
        entries += [(node.body[0].lineno + number, text) for number, text in documented(node)]  # type: ignore[attr-defined]
    return [(line, text) for line, text in sorted(entries) if re.split(r"[\s:,;.]", text)[0].lower() in REFUSED]


@pytest.mark.parametrize("entry", ["of blend and order.", "with it", "called once.", "as `x`, of texts", "which"])
def test_a_description_without_a_noun_is_found(entry: str) -> None:
    source = (
        f'def f(seed):\n    """Do.\n\n    Args:\n        seed: {entry}\n    """\nx = Field(1, description="{entry}")'
    )
    assert faults(source) == [(5, entry), (7, entry)]


@pytest.mark.parametrize(
    "entry", ["seed of the order.", "[N], one", "whether it may end", "what fills", "10 s windows"]
)
def test_a_description_with_a_noun_is_not(entry: str) -> None:
    assert faults(f'class A:\n    """A.\n\n    Attributes:\n        a, b: {entry}\n    """') == []


def test_each_description_begins_with_a_noun() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in files("af2_ray", "serve_apps")
        for line, text in faults(path.read_text())
    ]
    assert not found, "begin with the noun that it is:\n" + "\n".join(found)


def lines_with(pattern: str, *folders: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files(*folders, suffixes=(".py", ".yaml", ".html", ".md"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_a_word_with_eight_meanings_is_not_used() -> None:
    found = lines_with(r"(?i)(?<![^\W_])told(?![^\W_])", "af2_ray", "serve_apps", "jobs")
    assert not found, "say what it is (facts, counts, text ...):\n" + "\n".join(found)


def test_references_can_be_opened() -> None:
    found = lines_with(rf"\b({CLOSED_DOCUMENTS})\b", "af2_ray", "serve_apps", "jobs", "benchmarks", "tests")
    assert not found, "refer to arXiv 2503.03983 or to docs/paper.md:\n" + "\n".join(found)
