"""Where source clips come from: packages, sound fonts, a speech synthesiser, ourselves, or a folder."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import numpy as np
import soundfile

from af2_ray.audio.windows import SAMPLE_RATE
from af2_ray.synth.sounds import packages
from af2_ray.synth.sounds.catalogue import BEDS, CLASSES, SoundClass
from af2_ray.synth.sounds.curate import LEVEL, MAX_S, MIN_S, SHARES, Clip, Wave, assign_splits, make_clip, pieces
from af2_ray.synth.sounds.render import RENDERERS, Phrase, noise_bed, pad_bed, play, render, speak

log = logging.getLogger(__name__)

DRUM_KITS = (0, 8, 16, 24, 25, 32, 40)
ESPEAK_VOICES = {  # voice: pitch
    "en-us": 40,
    "en-gb": 60,
    "de": 35,
    "fr": 65,
    "es": 50,
    "it": 45,
    "sv": 70,
    "pl": 30,
    "en-us+f3": 60,
    "en-gb+f2": 50,
}
COLUMNS = ("id", "label", "package", "file", "licence", "split", "duration_s", "rms_db", "centroid_hz", "group")

# --- Where clips come from ---------------------------------------------------------------------------------------


def recorded(folders: dict[str, Path]) -> list[Clip]:
    """Clips of the recordings of `CLASSES` in unpacked packages."""
    rules = [(c.label, package, pattern) for c in CLASSES for package, pattern in c.files]
    return [
        make_clip(label, package, path, licence, piece, f"{package}:{_speaker(path) or path}")
        for label, package, path, licence, wave in _recordings(folders, rules, max_s=12)
        for piece in pieces(wave)
    ]


def _recordings(
    folders: dict[str, Path], rules: Iterable[tuple[str, str, str]], max_s: float
) -> Iterator[tuple[str, str, str, str, Wave]]:
    """(label, package, path, licence, wave) of what the first rule (label, package, pattern of the path) takes."""
    for package, folder in folders.items():
        patterns = [(label, re.compile(pattern)) for label, name, pattern in rules if name == package]
        licences = packages.Licences(package, folder)
        for path, source in packages.sounds(folder):
            label = next((label for label, pattern in patterns if pattern.search("/" + path)), None)
            if label is None:
                continue
            try:
                yield label, package, path, licences.of(path), packages.read_mono(source, max_s)
            except soundfile.LibsndfileError as error:
                log.info("%s: %s left out: %s", package, path, error)


def _speaker(path: str) -> str | None:
    """Spoken digits are one speaker a language: `symbols/math/3_pt.ogg` -> `pt`."""
    found = re.search(r"symbols/math/\d_(\w+)\.ogg$", path)
    return found.group(1) if found else None


def soundfont_clips(folders: dict[str, Path], seed: int, phrases_each: int = 6) -> list[Clip]:
    """Melodies and drum hits rendered from each sound font; a program of a font is one group."""
    fonts = [(name, font) for name in packages.SOUNDFONTS if name in folders for font in _fonts(folders[name])]
    wanted: list[tuple[str, str, Phrase]] = []
    rng = np.random.default_rng([seed, 1])
    for c in CLASSES:
        for program in c.programs:
            wanted += [(c.label, f"program {program}", p) for p in _melodies(c, program, phrases_each, rng)]
        for key in c.drums:
            for kit in DRUM_KITS:
                wanted.append(
                    (c.label, f"kit {kit} key {key}", Phrase(kit, (key,), int(rng.integers(80, 120)), 0.5, True))
                )
    with ThreadPoolExecutor(2) as pool:
        played = pool.map(lambda item: play(item[1], [phrase for *_, phrase in wanted]), fonts)
        return [
            make_clip(
                label,
                name,
                f"{what} keys {'-'.join(map(str, phrase.keys))} velocity {phrase.velocity}",
                packages.PACKAGES[name],
                piece,
                f"{name}:{what}",
            )
            for (name, _), waves in zip(fonts, played, strict=True)
            for (label, what, phrase), wave in zip(wanted, waves, strict=True)
            for piece in pieces(wave, max_pieces=1)
        ]


def _fonts(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.sf[23]") if p.is_file() and not p.is_symlink())[:1]


def _melodies(c: SoundClass, program: int, count: int, rng: np.random.Generator) -> list[Phrase]:
    """One probe note, equal in every font so that shared samples are found, then melodies of 1-3 notes."""
    low, high = c.register
    out = [Phrase(program, ((low + high) // 2,), 100, 1.0)]
    while len(out) < count:
        num = int(rng.integers(1, 4))
        steps = rng.choice([0, 2, 4, 5, 7, 9], num, replace=False)
        keys = tuple(int(key) for key in int(rng.integers(low, high - 8)) + steps)
        out.append(Phrase(program, keys, int(rng.integers(70, 120)), float(rng.uniform(0.7, 1.2)) / num))
    return out


def spoken() -> list[Clip]:
    """Words spoken by espeak-ng; a voice is one group."""
    return [
        make_clip("speech", "espeak-ng", f"{voice}: {words}", "GPL-3+", piece, f"espeak-ng:{voice}")
        for voice, pitch in ESPEAK_VOICES.items()
        for words in ("hello there", "one two", "good morning")
        for piece in pieces(speak(words, voice, pitch), max_pieces=1)
    ]


def self_rendered(seed: int, clips_each: int = 12) -> list[Clip]:
    """Sounds of our own making, for machines without packages and for tests; each clip is its own group."""
    out: list[Clip] = []
    for label in RENDERERS:
        for index in range(clips_each):
            wave = render(label, np.random.default_rng([seed, index, *label.encode()]))[: int(MAX_S * SAMPLE_RATE)]
            name = f"{label} {index}"
            out.append(make_clip(label, "rendered", name, "Apache-2.0", wave, f"rendered:{name}"))
    return out


def _own_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*/*")) if path.suffix.lower() in packages.SOUND_SUFFIXES]


def state(given: str) -> list[tuple[str, int, int]]:
    """Name, size and date of each file of a folder of one's own, for what is made of it; empty for what is built in."""
    if given in ("packages", "rendered"):
        return []
    stats = ((path.relative_to(given).as_posix(), path.stat()) for path in _own_files(Path(given)))
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def from_folder(folder: Path) -> list[Clip]:
    """Clips of a folder of `label/clip.*`; a file is one group.

    Raises:
        ValueError: no such folder, or no readable sound in it.
    """
    if not folder.is_dir():
        raise ValueError(f"corpus.sources: no folder {folder} (give packages, rendered, or a folder of label/clip.*)")
    out: list[Clip] = []
    for path in _own_files(folder):
        label = path.parent.name.lower().replace("_", " ")
        try:
            wave = packages.read_mono(path, max_s=12)
        except soundfile.LibsndfileError as error:
            log.warning("%s left out: %s", path, error)
            continue
        name = path.relative_to(folder).as_posix()
        found = pieces(wave)
        if not found:
            log.warning("%s left out: silent, broken or shorter than %.2f s", path, MIN_S)
        out += [make_clip(label, "folder", name, "as given", piece, f"folder:{name}") for piece in found]
    if not out:
        raise ValueError(f"corpus.sources: no readable sound at {folder}/label/clip.*")
    return out


# --- Beds --------------------------------------------------------------------------------------------------------

BED_S = 90.0  # seconds kept of a track


def recorded_beds(folders: dict[str, Path], seed: int) -> list[Clip]:
    """Music tracks and ambiences of the packages; all excerpts of one track are in one split."""
    order = [(kind, package) for kind, package, _ in BEDS]
    found = sorted(_recordings(folders, BEDS, max_s=BED_S), key=lambda row: order.index(row[:2]))
    return _split_beds([_bed(*row) for row in found], seed)


def rendered_beds(seed: int, kinds: Iterable[str] = ("quiet", "noise")) -> list[Clip]:
    """Noise of many colours (and `music`: slow chords; `ambience`: swelling noise), half a minute each."""
    beds = []
    for kind in kinds:
        for index in range(1 if kind == "quiet" else 12):
            rng = np.random.default_rng([seed, 3, index, *kind.encode()])
            wave = pad_bed(rng) if kind == "music" else noise_bed(rng, swell=kind == "ambience")
            beds.append(_bed(kind, "rendered", f"{kind} {index}", "Apache-2.0", wave))
    return _split_beds(beds, seed)


def _bed(kind: str, package: str, file: str, licence: str, wave: Wave) -> Clip:
    """A bed of RMS `LEVEL`, its end faded into its start so that it can be looped; it is a group of its own."""
    fade = min(len(wave) // 4, SAMPLE_RATE)
    ramp = np.linspace(0, 1, fade, dtype=np.float32)
    looped = wave[: len(wave) - fade].copy()
    looped[:fade] = looped[:fade] * ramp + wave[len(wave) - fade :] * (1 - ramp)
    levelled = np.asarray(looped * (LEVEL / max(float(np.sqrt((looped**2).mean())), 1e-6)), np.float32)
    return Clip(f"{package}:{file}", kind, package, file, licence, levelled, group=f"{package}:{file}")


def _split_beds(beds: Iterable[Clip], seed: int) -> list[Clip]:
    """Of each kind two thirds train, one in twelve val (at least one), the rest test; quiet is in all of them."""
    out: list[Clip] = []
    for kind, members in groupby(beds, key=attrgetter("label")):
        same = list(members)
        if kind == "quiet":
            out += [replace(bed, split=split) for bed in same for split in SHARES]
        elif len(same) < 3:
            out += [replace(bed, split="train") for bed in same]
        else:
            splits = assign_splits({bed.id: 1 for bed in same}, np.random.default_rng([seed, 4]))
            out += [replace(bed, split=splits[bed.id]) for bed in same]
    return out


# --- The table ---------------------------------------------------------------------------------------------------


def write_table(clips: Iterable[Clip], beds: Iterable[Clip], path: Path) -> None:
    """Write `sources.csv`: where every clip and bed is from, under which licence, and what was measured."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for c in (*clips, *(replace(bed, label=f"({bed.label} bed)") for bed in beds)):
            row = (c.id, c.label, c.package, c.file, c.licence, c.split, f"{c.duration_s:.3f}")
            writer.writerow((*row, c.rms_db, c.centroid_hz, c.group))
