"""The pages' pictures as SVG text: one look, few colours, every number readable."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from af2_ray.evaluate.paired import PairedRow
from af2_ray.evaluate.report.palette import CARD, DEAF, FAINT, INK, LIGHT, LINE, MODEL, TEXT
from af2_ray.storage.places import shown

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.fonttype": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": FAINT,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.transparent": True,
}

_COLOURS = {colour: f"var(--{name}, {colour})" for name, colour in LIGHT.items()}
_HEX = re.compile("#[0-9a-f]{6}")
_LABEL_LETTERS = 26  # of a group's name beside its line: the picture stays readable on a phone

Curve = Sequence[tuple[int, float]]
Rows = Mapping[str, Mapping[str, Any]]


def look(name: str, *, grid: Literal["x", "y", "both"] = "both") -> AbstractContextManager[None]:
    """The look of all pictures while one is drawn.

    Args:
        name: text that makes its ids, so that equal facts give equal bytes.
        grid: axis whose ticks have lines.
    """
    return mpl.rc_context(_STYLE | {"svg.hashsalt": name, "axes.grid.axis": grid})


def svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element as wide as its place, in the page's own colours, named for who cannot see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text[text.index("<svg") :], count=1)
    text = re.sub(r'style="[^"]*"', lambda style: _HEX.sub(lambda hit: _COLOURS.get(hit[0], hit[0]), style[0]), text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(name)}" ', 1)


def losses(curves: Mapping[str, Curve], titles: Mapping[str, str]) -> str:
    """Loss against optimiser step, a panel a curve: the steps faint, their running mean strong."""
    names = [name for name, curve in curves.items() if curve]
    with look("loss curves", grid="y"):
        figure = Figure(figsize=(2.1 * max(2, len(names)), 2.5))
        for place, name in enumerate(names):
            axes = figure.add_subplot(1, len(names), place + 1)
            steps, values = (np.array(column, dtype=float) for column in zip(*curves[name], strict=True))
            axes.plot(steps, values, color=MODEL, linewidth=0.8, alpha=0.3)
            axes.plot(steps, running_mean(values, max(1, len(values) // 12)), color=MODEL, linewidth=1.8)
            axes.set_title(titles.get(name, name), pad=8)
            axes.set(xlabel="step", ylim=(0, 1.05 * float(np.nanmax(values))))
        return svg(figure, "loss curves")


def running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Centred mean over `width` values, over fewer at the ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def accuracies(rows: Rows, name: str) -> str:
    """Model against its controls, a line a group: bar and 95 % interval, dots for controls, a tick for chance."""
    groups = list(rows)
    with look(name, grid="x"):
        figure = Figure(figsize=(7.0, 0.9 + 0.46 * len(groups)))
        axes = figure.add_subplot()
        for place, group in enumerate(groups):
            _accuracy_line(axes, place, rows[group])
        axes.set_yticks(range(len(groups)), [f"{group}  ({rows[group]['questions']})" for group in groups], color=INK)
        axes.set(xlim=(0, 100), ylim=(len(groups) - 0.4, -0.6), xlabel="right answers, %")
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), ncols=len(unique), loc="outside upper left", fontsize=9)
        return svg(figure, name)


def _accuracy_line(axes: Axes, place: int, row: Mapping[str, Any]) -> None:
    low, high = row["ci95"]["model"]
    axes.barh(place, 100 * row["model"], height=0.5, color=MODEL, alpha=0.88, label="model")
    axes.plot([100 * low, 100 * high], [place, place], color=INK, linewidth=1.2, label="95 % interval")
    for key, label, colour, marker in (("deaf", "deaf", DEAF, "o"), ("text_only", "text only", TEXT, "D")):
        if row.get(key) is not None:
            axes.plot(
                100 * row[key],
                place,
                marker,
                color=colour,
                markersize=7,
                markeredgecolor=CARD,
                label=label,
                zorder=4,
            )
    if row.get("chance") is not None:
        chance = 100 * row["chance"]
        axes.plot([chance, chance], [place - 0.36, place + 0.36], color=INK, linewidth=1.4, ls=":", label="chance")


def learning(training: Curve, validation: Curve, kept_step: int | None) -> str:
    """Loss against optimiser step: training faint and its running mean strong, validation as dots, the kept step."""
    with look("learning", grid="y"):
        figure = Figure(figsize=(4.8, 2.7))
        axes = figure.add_subplot()
        known = [(step, value) for step, value in training if np.isfinite(value)]
        if known:
            steps, values = (np.array(column, dtype=float) for column in zip(*known, strict=True))
            axes.plot(steps, values, color=MODEL, linewidth=0.8, alpha=0.3)
            mean = running_mean(values, max(1, len(values) // 12))
            axes.plot(steps, mean, color=MODEL, linewidth=1.8, label="training")
        held_out = [(step, value) for step, value in validation if np.isfinite(value)]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o-", color=DEAF, linewidth=1.2, markersize=4, label="validation")
        if kept_step is not None:
            axes.axvline(kept_step, color=INK, linewidth=1.0, linestyle=":", label=f"kept: step {kept_step}")
        top = max((value for _, value in (*known, *held_out)), default=1.0)
        axes.set(xlabel="step", ylim=(0, 1.05 * top if top > 0 else 1.0))
        if axes.get_legend_handles_labels()[1]:
            figure.legend(ncols=3, loc="outside upper left", fontsize=9)
        return svg(figure, "loss curve")


def changes(rows: Mapping[str, PairedRow], name: str) -> str:
    """Right answers before and after, two dots with their 95 % intervals a group; a tick for chance, the change."""
    groups = list(rows)
    with look(name, grid="x"):
        figure = Figure(figsize=(4.8, 0.9 + 0.46 * len(groups)))
        axes = figure.add_subplot()
        for place, row in enumerate(rows.values()):
            _change_line(axes, place, row)
        labels = [f"{_cut(group)}  ({rows[group].questions})" for group in groups]
        axes.set_yticks(range(len(groups)), labels, color=INK, parse_math=False)
        axes.set(xlim=(-2, 102), ylim=(len(groups) - 0.4, -0.6), xlabel="right answers, %")
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), ncols=len(unique), loc="outside upper left", fontsize=9)
        return svg(figure, name)


def _change_line(axes: Axes, place: int, row: PairedRow) -> None:
    sides = (-0.14, row.before, row.before_ci95, DEAF, "before"), (0.14, row.after, row.after_ci95, MODEL, "after")
    for shift, share, ci95, colour, label in sides:
        if ci95 is not None:
            ends = [100 * end for end in ci95]
            axes.plot(ends, [place + shift] * 2, color=colour, linewidth=1.6, alpha=0.6)
        axes.plot(100 * share, place + shift, "o", color=colour, markersize=7, label=label, zorder=4)
    if row.chance is not None:
        chance = 100 * row.chance
        axes.plot([chance, chance], [place - 0.36, place + 0.36], color=INK, linewidth=1.4, ls=":", label="chance")
    beside = axes.get_yaxis_transform()
    axes.text(1.02, place, f"{100 * row.change:+.1f}", transform=beside, va="center", fontweight="bold")


def _cut(name: str) -> str:
    """A name on one line, cut where it is long."""
    plain = shown(name)
    return plain if len(plain) <= _LABEL_LETTERS else f"{plain[: _LABEL_LETTERS - 1]}…"


def padding(stages: Sequence[Mapping[str, Any]]) -> str:
    """Share of padded windows a stage, as planned and as it would be without planning."""
    with look("padding", grid="x"):
        figure = Figure(figsize=(7.0, 0.8 + 0.62 * len(stages)))
        axes = figure.add_subplot()
        for place, stage in enumerate(stages):
            pairs = ((-0.17, "padding_share", MODEL, "planned"), (0.17, "padding_share_unplanned", DEAF, "not planned"))
            for shift, key, colour, label in pairs:
                share = 100 * stage[key]
                axes.barh(place + shift, share, height=0.3, color=colour, label=label if place == 0 else None)
                axes.text(share + 0.8, place + shift, f"{share:.1f}", va="center", fontsize=9)
        axes.set_yticks(range(len(stages)), [stage["name"] for stage in stages], color=INK)
        axes.invert_yaxis()
        widest = max(10.0, *(115 * stage["padding_share_unplanned"] for stage in stages))
        axes.set(xlim=(0, widest), xlabel="padding, % of all audio windows")
        figure.legend(ncols=2, loc="outside upper left", fontsize=9)
        return svg(figure, "padding")


def histograms(panels: Mapping[str, Sequence[float]], logarithmic: Sequence[str] = ()) -> str:
    """How often values occur, a panel each; `logarithmic` names those with a logarithmic axis."""
    with look("histograms", grid="y"):
        figure = Figure(figsize=(9.2, 2.4))
        for axes, (title, values) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            space: Callable[..., NDArray[np.float64]] = np.geomspace if title in logarithmic else np.linspace
            if values:
                axes.hist(values, space(max(min(values), 0.1), max(max(values), 0.2) * 1.001, 40), color=MODEL)
            axes.set(title=title, xscale="log" if title in logarithmic else "linear")
        return svg(figure, "histograms")


def points(levels: Mapping[str, Sequence[tuple[float, Sequence[float]]]], key: str, metric: str) -> str:
    """A metric against the values of one key: a dot (mean) and its 95 % interval for each point of a value."""
    with look(key, grid="y"):
        figure = Figure(figsize=(7.0, 2.6))
        axes = figure.add_subplot()
        for level, found in enumerate(levels.values()):
            for number, (mean, ci95) in enumerate(found):
                place = level + 0.06 * (number - (len(found) - 1) / 2)
                axes.plot([place, place], ci95, color=INK, linewidth=1.2)
                axes.plot(place, mean, "o", color=MODEL)
        axes.set(xticks=range(len(levels)), xticklabels=list(levels), xlabel=key, ylabel=metric)
        return svg(figure, key)


def parallel(rows: Sequence[tuple[Mapping[str, Any], float | None]], keys: Sequence[str], metric: str) -> str:
    """Parallel coordinates: a line a row through its values to its metric; faint where there is no metric."""
    levels = {key: list(dict.fromkeys(str(values[key]) for values, _ in rows)) for key in keys}
    heights = {key: np.linspace(0, 1, max(2, len(names))).tolist() for key, names in levels.items()}
    found = [score for _, score in rows if score is not None]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    with look("parallel coordinates"):
        figure = Figure(figsize=(9.2, 3.2))
        axes = figure.add_subplot()
        for values, score in rows:
            line = [heights[key][levels[key].index(str(values[key]))] for key in keys]
            if score is None:
                axes.plot(range(len(keys)), line, color=FAINT, linewidth=0.8, marker=".")
                continue
            share = (score - low) / (high - low) if high > low else 0.5
            good = 1 - share if metric == "loss" else share
            axes.plot(range(len(keys) + 1), [*line, share], color=MODEL, alpha=0.2 + 0.8 * good, linewidth=1.4)
        notes = [(place, y, text) for place, key in enumerate(keys) for y, text in zip(heights[key], levels[key])]
        notes += [(len(keys), share, f"{low + share * (high - low):.3f}") for share in (0.0, 1.0)]
        for place, y, text in notes:
            axes.annotate(text, (place, y), textcoords="offset points", xytext=(4, 3))
        axes.set(xticks=range(len(keys) + 1), xticklabels=[*keys, metric], yticks=[])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        return svg(figure, "parallel coordinates")
