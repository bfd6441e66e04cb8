"""The picture of a scene: what is heard as mel bins, and above it what is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from af2_ray.audio.mel import LogMel
from af2_ray.audio.windows import WINDOW_S, to_windows
from af2_ray.evaluate.report.palette import MODEL
from af2_ray.evaluate.report.plots import look, svg


def draw_scene(mono: NDArray[np.floating], events: Sequence[Mapping[str, Any]], duration_s: float) -> str:
    """Mel picture of a scene with its events above it: a bar a hit, the label behind the last (before the first, late).

    Args:
        mono: recording [T] at 16 kHz.
        events: truth of the scene: `label`, `onsets_s` and `hit_s`, the length of one hit.
        duration_s: length of it.
    """
    with torch.inference_mode():
        mel = LogMel()(torch.from_numpy(to_windows(mono))).numpy()
    picture = np.concatenate([window[:-1] for window in mel]).T  # [64, 1000 frames a window]
    picture = picture[:, : round(picture.shape[1] * duration_s / (len(mel) * WINDOW_S))]
    ordered = sorted(events, key=lambda event: float(event["onsets_s"][0]))
    lanes = _lanes(ordered, duration_s)
    num_lanes = max(lanes, default=0) + 1
    with look("mel picture of a scene"):
        figure = Figure(figsize=(9.2, 2.9 + 0.26 * num_lanes))
        bars, axes = figure.subplots(2, 1, sharex=True, height_ratios=(0.26 * num_lanes + 0.1, 2.4))
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
            _mark_event(bars, event, lane, duration_s)
            for edge_s in _span(event):
                axes.axvline(edge_s, color="white", linewidth=0.8, alpha=0.6, linestyle=(0, (2, 3)))
        bars.set_ylim(-num_lanes + 0.4, 0.6)
        bars.axis("off")
        axes.set(xlim=(0, duration_s), xlabel="seconds", ylabel="mel bin")
        axes.grid(visible=False)
        return svg(figure, "mel picture of a scene")


def _mark_event(bars: Axes, event: Mapping[str, Any], lane: int, duration_s: float) -> None:
    start_s, end_s = _span(event)
    onsets_s = [float(onset_s) for onset_s in event["onsets_s"]]
    bars.barh([-lane] * len(onsets_s), float(event["hit_s"]), left=onsets_s, height=0.7, color=MODEL, alpha=0.9)
    late, gap_s = _is_late(event, duration_s), 0.006 * duration_s
    bars.text(
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
