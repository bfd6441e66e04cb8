"""The report's pictures as SVG text: one look, few colours, every number readable."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from af2_ray.audio.mel import LogMel
from af2_ray.audio.windows import WINDOW_S, to_windows

INK, FAINT, GRID = "#26323b", "#8b979f", "#e4e2db"
MODEL, DEAF, TEXT, CHANCE = "#1f6f78", "#c58b3b", "#9b8aa6", "#8b979f"

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.fonttype": "none",
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
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

Curve = Sequence[tuple[int, float]]
Rows = Mapping[str, Mapping[str, Any]]


@contextmanager
def _figure(name: str, width: float, height: float, found: list[str]) -> Iterator[Figure]:
    """A figure in the report's style; its SVG is put into `found` when the block ends."""
    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(width, height))
        yield figure
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r"(svg|svg [^>]*?)height=\"[^\"]*pt\"", r"\1", svg, count=1)
    found.append(svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1))


def losses(curves: Mapping[str, Curve], titles: Mapping[str, str]) -> str:
    """Loss against optimiser step, a panel a curve: the steps faint, their running mean strong."""
    names = [name for name, curve in curves.items() if curve]
    found: list[str] = []
    with _figure("loss curves", 2.1 * max(2, len(names)), 2.5, found) as figure:
        for place, name in enumerate(names):
            axes = figure.add_subplot(1, len(names), place + 1)
            steps, values = (np.array(column, dtype=float) for column in zip(*curves[name], strict=True))
            axes.plot(steps, values, color=MODEL, linewidth=0.8, alpha=0.3)
            axes.plot(steps, running_mean(values, max(1, len(values) // 12)), color=MODEL, linewidth=1.8)
            axes.set_title(titles.get(name, name), pad=8)
            axes.set_xlabel("step")
            axes.set_ylim(bottom=0, top=1.05 * float(np.nanmax(values)))
            axes.grid(axis="x", visible=False)
    return found[0]


def running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Centred mean over `width` values, over fewer at the ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def accuracies(rows: Rows, name: str) -> str:
    """Model against its controls, a line a group: bar and 95 % interval, dots for controls, a tick for chance."""
    groups = list(rows)
    found: list[str] = []
    with _figure(name, 7.0, 0.9 + 0.46 * len(groups), found) as figure:
        axes = figure.add_subplot()
        for place, group in enumerate(groups):
            _accuracy_line(axes, place, rows[group])
        axes.set_yticks(range(len(groups)), [f"{group}  ({rows[group]['questions']})" for group in groups])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xlabel("right answers, %")
        axes.grid(axis="y", visible=False)
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), ncols=len(unique), loc="outside upper left", fontsize=9)
    return found[0]


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
                markeredgecolor="white",
                label=label,
                zorder=4,
            )
    if row.get("chance") is not None:
        chance = 100 * row["chance"]
        axes.plot([chance, chance], [place - 0.36, place + 0.36], color=INK, linewidth=1.4, ls=":", label="chance")


def padding(stages: Sequence[Mapping[str, Any]]) -> str:
    """Share of padded windows a stage, as planned and as it would be without planning."""
    found: list[str] = []
    with _figure("padding", 7.0, 0.8 + 0.62 * len(stages), found) as figure:
        axes = figure.add_subplot()
        for place, stage in enumerate(stages):
            pairs = ((-0.17, "padding_share", MODEL, "planned"), (0.17, "padding_share_unplanned", DEAF, "not planned"))
            for shift, key, colour, label in pairs:
                share = 100 * stage[key]
                axes.barh(place + shift, share, height=0.3, color=colour, label=label if place == 0 else None)
                axes.text(share + 0.8, place + shift, f"{share:.1f}", va="center", fontsize=9)
        axes.set_yticks(range(len(stages)), [stage["name"] for stage in stages])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, max(10.0, *(115 * stage["padding_share_unplanned"] for stage in stages)))
        axes.set_xlabel("padding, % of all audio windows")
        axes.grid(axis="y", visible=False)
        figure.legend(ncols=2, loc="outside upper left", fontsize=9)
    return found[0]


def scene(mono: NDArray[np.floating], events: Sequence[Mapping[str, Any]], duration_s: float) -> str:
    """Mel picture of a scene with its events above it: a bar a hit, the label behind the last (before the first, late).

    Args:
        mono: the recording [T] at 16 kHz.
        events: the scene's truth: `label`, `onsets_s` and `hit_s`, the length of one hit.
        duration_s: its length.
    """
    with torch.inference_mode():
        mel = LogMel()(torch.from_numpy(to_windows(mono))).numpy()
    picture = np.concatenate([window[:-1] for window in mel]).T  # [64, 1000 frames a window]
    picture = picture[:, : round(picture.shape[1] * duration_s / (len(mel) * WINDOW_S))]
    ordered = sorted(events, key=lambda event: float(event["onsets_s"][0]))
    lanes = _lanes(ordered, duration_s)
    num_lanes = max(lanes, default=0) + 1
    found: list[str] = []
    with _figure("mel picture of a scene", 9.2, 2.9 + 0.26 * num_lanes, found) as figure:
        marks, axes = figure.subplots(2, 1, sharex=True, height_ratios=(0.26 * num_lanes + 0.1, 2.4))
        axes.imshow(
            picture,
            origin="lower",
            aspect="auto",
            extent=(0, duration_s, 0, 64),
            cmap="magma",
            vmin=float(np.percentile(picture, 8)),
            vmax=float(picture.max()),
            interpolation="nearest",
        )
        for event, lane in zip(ordered, lanes, strict=True):
            _mark_event(marks, event, lane, duration_s)
            for edge_s in _span(event):
                axes.axvline(edge_s, color="white", linewidth=0.8, alpha=0.6, linestyle=(0, (2, 3)))
        marks.set_ylim(-num_lanes + 0.4, 0.6)
        marks.axis("off")
        axes.set_xlim(0, duration_s)
        axes.set_ylabel("mel bin")
        axes.set_xlabel("seconds")
        axes.grid(visible=False)
    return found[0]


def _mark_event(marks: Axes, event: Mapping[str, Any], lane: int, duration_s: float) -> None:
    start_s, end_s = _span(event)
    onsets_s = [float(onset_s) for onset_s in event["onsets_s"]]
    marks.barh([-lane] * len(onsets_s), float(event["hit_s"]), left=onsets_s, height=0.7, color=MODEL, alpha=0.9)
    late, gap_s = _is_late(event, duration_s), 0.006 * duration_s
    marks.text(
        start_s - gap_s if late else end_s + gap_s,
        -lane,
        str(event["label"]),
        va="center",
        ha="right" if late else "left",
        fontsize=9,
    )


def _span(event: Mapping[str, Any]) -> tuple[float, float]:
    """First onset and last end."""
    onsets_s = [float(onset_s) for onset_s in event["onsets_s"]]
    return onsets_s[0], onsets_s[-1] + float(event["hit_s"])


def _is_late(event: Mapping[str, Any], duration_s: float) -> bool:
    """Whether a label behind the event would leave the picture."""
    return _span(event)[1] > 0.85 * duration_s and _span(event)[0] > 0.2 * duration_s


def _lanes(events: Sequence[Mapping[str, Any]], duration_s: float) -> list[int]:
    """The first free lane for each event, its label included; labels are taken as wide as their letters."""
    taken: list[list[tuple[float, float]]] = []
    lanes = []
    for event in events:
        label_s = 0.014 * duration_s * (len(str(event["label"])) + 2)
        start_s, end_s = _span(event)
        begin_s, done_s = (start_s - label_s, end_s) if _is_late(event, duration_s) else (start_s, end_s + label_s)
        free = (all(done_s <= a or begin_s >= b for a, b in spans) for spans in taken)
        lane = next((place for place, is_free in enumerate(free) if is_free), len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((begin_s, done_s))
        lanes.append(lane)
    return lanes
