"""Pages: a template beside this file fills the one skeleton, `page.html`, in one style.

Everything is inline, so that a page can be mailed and opened without a network.
"""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import Any, Literal

import soundfile as sf
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from af2_ray.audio.windows import SAMPLE_RATE
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


def audio_uri(mono: NDArray[Any], kind: Literal["flac", "ogg"]) -> str:
    """A recording [T] at 16 kHz as the address of a player: the file itself. OGG takes a tenth of its samples."""
    buffer = io.BytesIO()
    with sf.SoundFile(buffer, "w", SAMPLE_RATE, 1, format=kind) as file:
        for start in range(0, len(mono), SAMPLE_RATE):  # the encoder of OGG falls over a minute in one call
            file.write(mono[start : start + SAMPLE_RATE])
    return f"data:audio/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@cache
def _environment() -> Environment:
    loader = PackageLoader("af2_ray.evaluate", "report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters["percent"] = percent
    environment.globals["palette"] = palette
    return environment
