"""Pages: a template beside this file fills the one skeleton, `page.html`, in one style.

Everything is inline, so that a page can be mailed and opened without a network.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from af2_ray.evaluate.report import palette


def render(template: str, **values: Any) -> str:
    """A page; texts are escaped, pictures (SVG) are what the templates call safe.

    Args:
        template: name of the file, for instance `run.html`.
        values: facts that it shows; `title` is always needed.
    """
    return _environment().get_template(template).render(values)


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal and no sign; a dash for none."""
    return "–" if share is None else f"{100 * share:.1f}"


@cache
def _environment() -> Environment:
    loader = PackageLoader("af2_ray.evaluate", "report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters["percent"] = percent
    environment.globals["palette"] = palette
    return environment
