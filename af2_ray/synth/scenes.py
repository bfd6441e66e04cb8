"""Scenes whose truth is known to the sample: which sounds, when, how often, how loud.

Scenes are made in BLOCKS of four of one length: two FAMILIES with different classes, and in each family two mirrored
scenes that share clips and bed and differ in one relation only (who comes first, how often, who is louder, louder or
softer, in which part). Every question has its counterpart inside the block, so that the words of a question, the
length of the clip and the number of its events say nothing about the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from af2_ray.audio.windows import SAMPLE_RATE
from af2_ray.config import SceneSet
from af2_ray.synth.facts import MAX_COUNT, PARTS, SOUND, Facts, Sound
from af2_ray.synth.sounds.bank import Bank, Entry
from af2_ray.synth.sounds.curate import LEVEL

KINDS = ("order", "count", "attribute", "position")  # what is exchanged between mirrored scenes
MAX_HIT_S = 1.8
MAX_BOUT_S = 12.0
HISS_DB = -50.0  # white noise under everything, against a hit at 0 dB
Rng = np.random.Generator


@dataclass(frozen=True)
class Event:
    """One sound of a scene: a clip, `count` hits of `hit_s` with `gap_s` between them, the first at `start_s`."""

    label: str
    clip: Entry = field(repr=False)
    hit_s: float
    gap_s: float
    count: int
    gains_db: tuple[float, ...]
    start_s: float = 0.0  # until it has its place

    @property
    def length_s(self) -> float:
        """How long it takes."""
        return self.count * self.hit_s + (self.count - 1) * self.gap_s

    @property
    def onsets_s(self) -> tuple[float, ...]:
        """When each hit begins."""
        return tuple(round(self.start_s + i * (self.hit_s + self.gap_s), 4) for i in range(self.count))

    @property
    def span_s(self) -> tuple[float, float]:
        """From the first onset to the last end."""
        return self.onsets_s[0], self.onsets_s[-1] + self.hit_s


@dataclass(frozen=True)
class Scene:
    """One scene, not yet rendered. `events` are in order of their first onset.

    Attributes:
        kind: relation in which the mirrored scene differs (`KINDS`).
        relation: its value here: order: forward or reversed; count: the number of hits; attribute: loud or soft (the
            first focus event against the second), louder or softer (in time); position: one of `PARTS`.
        focus: labels of the events that the relation is about.
        family: number that two mirrored scenes share.
        block: number that four scenes of one length share.
    """

    block: int
    family: int
    kind: str
    duration_s: float
    bed: Entry = field(repr=False)
    bed_kind: str = "noise"
    bed_start: int = 0
    bed_db: float = -60.0
    peak: float = 0.9
    mirror: int = 0
    relation: str = ""
    focus: tuple[str, ...] = ()
    events: tuple[Event, ...] = ()
    together: bool = False  # the two focus events sound at the same time

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes in order of onset."""
        return tuple(event.label for event in self.events)

    def part_of(self, event: Event) -> str:
        """The part of the clip (`PARTS`) that the middle of an event falls in."""
        start, end = event.span_s
        return PARTS[int((start + end) / 2 / self.duration_s * len(PARTS))]


def facts_of(scene: Scene) -> Facts:
    """What is known of a scene: everything but the clips and the bed that it is mixed from."""
    sounds = tuple(Sound(event.label, _attribute(scene, event), scene.part_of(event)) for event in scene.events)
    return Facts(sounds, scene.kind, scene.relation, scene.focus, scene.together)


def _attribute(scene: Scene, event: Event) -> str:
    """What a caption says of an event: the relation, if it is about this event and no order."""
    if event.label not in scene.focus or scene.kind in ("order", SOUND):
        return ""
    if scene.kind == "attribute" and event.label != scene.focus[0]:
        return "soft" if scene.relation == "loud" else "loud"
    return scene.relation


# --- Composing ---------------------------------------------------------------------------------------------------


def compose_block(scenes: SceneSet, bank: Bank, block: int, seed: int) -> list[Scene]:
    """The four scenes of a block: family 0 mirror 0 and 1, family 1 mirror 0 and 1. Depends on its arguments alone."""
    rng = np.random.default_rng([seed, *f"{scenes.name}/{scenes.split}".encode(), block])
    low, high = scenes.num_events
    kind = KINDS[block % len(KINDS)] if high >= 2 else SOUND
    duration_s = round(float(rng.uniform(*scenes.duration_s)), 2)
    bed_kind = _bed_kind(duration_s, rng)
    pool = bank.askable(bed_kind)
    if len(pool) < 6:
        bed_kind, pool = "noise", bank.labels
    # the change of loudness in time needs one event; who is louder needs two
    variant = ("binding" if rng.random() < 0.5 else "change") if kind == "attribute" else kind
    least = 2 if variant in ("order", "binding") else 1
    num_events = int(rng.integers(max(low, least), max(high, least) + 1))
    num_events = max(min(num_events, (len(pool) - 2) // 2, _fits(duration_s, variant)), least)
    per_family = 2 if kind == SOUND else num_events
    chosen = [str(label) for label in rng.permutation(pool)[: 2 * per_family]]
    out: list[Scene] = []
    for family in (0, 1):
        bed = bank.bed(scenes.split, bed_kind, rng)
        base = Scene(
            block,
            2 * block + family,
            kind,
            duration_s,
            bed,
            bed_kind,
            bed_start=int(rng.integers(bed.length)),
            bed_db=_bed_db(bed_kind, variant, rng),
            peak=round(float(rng.uniform(0.4, 0.95)), 3),
        )
        labels = chosen[family * per_family : (family + 1) * per_family]
        together = [[label] for label in labels] if kind == SOUND else [labels]  # in one scene
        plans = [plan for group in together for plan in _plans(group, scenes.split, bank, duration_s, variant, rng)]
        out += _MIRRORS[variant](base, plans, rng)
    return out


def _bed_kind(duration_s: float, rng: Rng) -> str:
    shares = {"quiet": 0.3, "noise": 0.4, "ambience": 0.2, "music": 0.1}
    if duration_s > 30:
        shares = {"quiet": 0.0, "noise": 0.1, "ambience": 0.3, "music": 0.6}
    return str(rng.choice(list(shares), p=list(shares.values())))


def _bed_db(kind: str, variant: str, rng: Rng) -> float:
    """Level of the bed (RMS) against a hit at 0 dB; the softest hit, at -15 dB, stays 10 dB above it."""
    if kind == "quiet":
        return float(rng.uniform(-60, -45))
    return float(rng.uniform(-42, -30) if variant in ("binding", "change") else rng.uniform(-38, -24))


def _fits(duration_s: float, variant: str) -> int:
    """How many events have room: about 2.5 s each, more where one is repeated; one in each part."""
    if variant == "position":
        return len(PARTS)
    return max(1, int(duration_s / (2.8 if variant in ("count", "change") else 2.3)))


def _plans(labels: list[str], split: str, bank: Bank, duration_s: float, variant: str, rng: Rng) -> list[Event]:
    """Choose clip, hits and gaps of each event so that all have room; what is counted or changes has twice the room."""
    repeated = variant in ("count", "change")
    share_s = 0.88 * duration_s / (len(PARTS) if variant == "position" else len(labels) + repeated)
    plans = []
    for index, label in enumerate(labels):
        asked = index == 0 and repeated
        room_s, most = (2 * share_s, MAX_COUNT) if asked else (share_s, 1)
        clip = bank.clip(split, label, rng)
        gap_s = round(float(rng.uniform(0.25, 0.45) if asked else rng.uniform(0.05, 0.35)), 3)
        hit_s = round(min(clip.length / SAMPLE_RATE, MAX_HIT_S, (room_s - (most - 1) * gap_s) / most), 3)
        # an event is a bout that fills much of its room, up to 12 s: sparse sounds drown in a clip's mean feature
        wanted_s = float(rng.uniform(0.75, 1.0)) * min(room_s, MAX_BOUT_S)
        fitting = int((room_s + gap_s) / (hit_s + gap_s))
        filling = round((wanted_s + gap_s) / (hit_s + gap_s))
        count = most if asked else max(1, min(filling, fitting))
        plans.append(Event(label, clip, hit_s, gap_s, count, (round(float(rng.uniform(-3, 0)), 2),) * count))
    return plans


def _spread(spans_s: list[float], duration_s: float, rng: Rng) -> list[float]:
    """Onsets of events that follow one another, with the free time dealt out at random between them."""
    free_s = duration_s - 0.2 - sum(spans_s)
    gaps = rng.dirichlet(np.ones(len(spans_s) + 1))
    least = min(0.3, 0.5 * free_s / (len(spans_s) + 1))
    gaps_s = least + gaps * (free_s - least * (len(spans_s) + 1))
    onsets, now = [], 0.1
    for gap_s, span_s in zip(gaps_s, spans_s, strict=False):
        now += float(gap_s)
        onsets.append(now)
        now += span_s
    return onsets


def _scene(
    base: Scene, mirror: int, relation: str, focus: Sequence[str], events: Iterable[Event], together: bool = False
) -> Scene:
    ordered = tuple(sorted(events, key=lambda event: event.start_s))
    return replace(base, mirror=mirror, relation=relation, focus=tuple(focus), events=ordered, together=together)


def _order(base: Scene, plans: list[Event], rng: Rng) -> list[Scene]:
    """The same events forwards and backwards, in the same rhythm of gaps."""
    starts = _spread([plan.length_s for plan in plans], base.duration_s, rng)
    forward = [replace(plan, start_s=at) for plan, at in zip(plans, starts, strict=True)]
    backward = [replace(event, start_s=base.duration_s - event.span_s[1]) for event in forward]
    labels = [plan.label for plan in plans]
    return [_scene(base, 0, "forward", labels, forward), _scene(base, 1, "reversed", labels, backward)]


def _count(base: Scene, plans: list[Event], rng: Rng) -> list[Scene]:
    """The first event with two different numbers of hits.

    The other family of the block gets the two numbers that are left, so no number is more frequent than another.
    """
    counts = [int(count) + 1 for count in np.random.default_rng(base.block).permutation(MAX_COUNT)]
    forms = {
        str(count): replace(plans[0], count=count, gains_db=plans[0].gains_db[:count])
        for count in (counts[:2] if base.family % 2 else counts[2:])
    }
    return _first_changed(base, forms, plans, rng)


def _change(base: Scene, plans: list[Event], rng: Rng) -> list[Scene]:
    """The first event gets louder, hit by hit, or softer."""
    ramp = tuple(float(gain) for gain in np.linspace(-15, 0, plans[0].count).round(2))
    forms = {"louder": replace(plans[0], gains_db=ramp), "softer": replace(plans[0], gains_db=ramp[::-1])}
    return _first_changed(base, forms, plans, rng)


def _first_changed(base: Scene, forms: Mapping[str, Event], plans: list[Event], rng: Rng) -> list[Scene]:
    """A scene for each form of the first event, by its relation; the others stay where they are."""
    order = rng.permutation(len(plans))
    starts = dict(zip(order, _spread([plans[i].length_s for i in order], base.duration_s, rng), strict=True))
    out = []
    for mirror, (relation, first) in enumerate(forms.items()):
        events = [replace(plan, start_s=starts[i]) for i, plan in enumerate([first, *plans[1:]])]
        out.append(_scene(base, mirror, relation, [first.label], events))
    return out


def _binding(base: Scene, plans: list[Event], rng: Rng) -> list[Scene]:
    """Two events, one loud and one soft; one time in four they sound at the same time."""
    together = bool(rng.random() < 0.25)
    soft_db = -8.0 if together else -13.0
    first, second, *others = plans
    rows = [[first, second], *([other] for other in others)] if together else [[plan] for plan in plans]
    order = rng.permutation(len(rows))
    lengths = [max(plan.length_s for plan in rows[i]) for i in order]
    starts = zip(order, _spread(lengths, base.duration_s, rng), strict=True)
    placed = [replace(plan, start_s=at) for i, at in starts for plan in rows[i]]
    out = []
    for mirror, (relation, first_db, second_db) in enumerate((("loud", 0.0, soft_db), ("soft", soft_db, 0.0))):
        levels_db = {first.label: first_db, second.label: second_db}
        events = [replace(e, gains_db=(levels_db.get(e.label, -5.0),) * e.count) for e in placed]
        out.append(_scene(base, mirror, relation, [first.label, second.label], events, together))
    return out


def _position(base: Scene, plans: list[Event], rng: Rng) -> list[Scene]:
    """The first event in one part of the clip or in another, where it changes places with what is there."""
    parts = [int(part) for part in rng.permutation(len(PARTS))]
    third = base.duration_s / 3
    margin = 0.05 * third
    shifts = [float(rng.random()) for _ in plans]
    target = parts[1] if len(plans) < 2 else parts[int(rng.integers(1, len(plans)))]
    exchanged = [target, *(parts[0] if part == target else part for part in parts[1:])]
    out = []
    for mirror, places in enumerate((parts, exchanged)):
        events = [
            replace(plan, start_s=part * third + margin + shift * max(0.0, third - 2 * margin - plan.length_s))
            for plan, part, shift in zip(plans, places, shifts, strict=False)
        ]
        out.append(_scene(base, mirror, PARTS[places[0]], [plans[0].label], events))
    return out


def _sound(base: Scene, plans: list[Event], rng: Rng) -> list[Scene]:
    """One sound alone, then another in its place."""
    out = []
    for mirror, plan in enumerate(plans):
        event = replace(plan, start_s=float(rng.uniform(0, base.duration_s - plan.length_s)))
        out.append(_scene(base, mirror, plan.label, [plan.label], [event]))
    return out


_MIRRORS = {
    "sound": _sound,
    "order": _order,
    "count": _count,
    "change": _change,
    "binding": _binding,
    "position": _position,
}

# --- Rendering ---------------------------------------------------------------------------------------------------


def render_scene(scene: Scene, bank: Bank) -> NDArray[np.int16]:
    """Mix a scene: int16 [T] at 16 kHz, its peak at `scene.peak`, over the faint hiss that every recording has.

    Without it, beds fall to digital silence between events: -100 dB in the mel, which no microphone gives and which
    would set the spread of the mel statistics.
    """
    num = round(scene.duration_s * SAMPLE_RATE)
    mix = bank.read(scene.bed, scene.bed_start, num)
    mix *= np.float32(LEVEL * 10 ** (scene.bed_db / 20))
    hiss = np.random.default_rng(scene.block).standard_normal(num, np.float32)  # the mirrored scenes share it
    mix += hiss * np.float32(LEVEL * 10 ** (HISS_DB / 20))
    for event in scene.events:
        hit = bank.read(event.clip, 0, min(event.clip.length, round(event.hit_s * SAMPLE_RATE)))
        if len(hit) < event.clip.length:
            ramp = min(len(hit) // 3, SAMPLE_RATE // 20)
            hit[-ramp:] *= np.linspace(1, 0, ramp, dtype=np.float32)
        for onset_s, gain_db in zip(event.onsets_s, event.gains_db, strict=True):
            start = round(onset_s * SAMPLE_RATE)
            stop = min(start + len(hit), num)
            mix[start:stop] += hit[: stop - start] * np.float32(10 ** (gain_db / 20))
    mix *= np.float32(scene.peak / max(float(np.abs(mix).max()), 1e-6))
    return np.asarray(np.rint(mix * 32767), np.int16)
