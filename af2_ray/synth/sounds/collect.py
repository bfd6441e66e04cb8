"""Where source clips come from: packages, sound fonts, a speech synthesiser, ourselves, or a folder."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import soxr

from af2_ray.audio.windows import SAMPLE_RATE
from af2_ray.synth.sounds import packages
from af2_ray.synth.sounds.bank import Bed
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
    out: list[Clip] = []
    for package, folder in folders.items():
        rules = [(c.label, re.compile(pattern)) for c in CLASSES for name, pattern in c.files if name == package]
        if not rules:
            continue
        licences = packages.Licences(package, folder)
        for path, source in packages.sounds(folder):
            label = next((label for label, pattern in rules if pattern.search("/" + path)), None)
            if label is None:
                continue
            try:
                wave = packages.read_mono(source, max_s=12)
            except soundfile.LibsndfileError as error:
                log.info("%s: %s left out: %s", package, path, error)
                continue
            group = f"{package}:{_speaker(path) or path}"
            out += [make_clip(label, package, path, licences.of(path), piece, group) for piece in pieces(wave)]
    return out


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
    out: list[Clip] = []
    with ThreadPoolExecutor(2) as pool:
        played = pool.map(lambda item: play(item[1], [phrase for *_, phrase in wanted]), fonts)
        for (name, _), waves in zip(fonts, played, strict=True):
            for (label, what, phrase), wave in zip(wanted, waves, strict=True):
                file = f"{what} keys {'-'.join(map(str, phrase.keys))} velocity {phrase.velocity}"
                for piece in pieces(wave, max_pieces=1):
                    out.append(make_clip(label, name, file, packages.PACKAGES[name], piece, f"{name}:{what}"))
    return out


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
    out: list[Clip] = []
    for voice, pitch in ESPEAK_VOICES.items():
        for words in ("hello there", "one two", "good morning"):
            mono, rate = speak(words, voice, pitch=pitch)
            wave = np.asarray(soxr.resample(mono, rate, SAMPLE_RATE), np.float32)
            for piece in pieces(wave, max_pieces=1):
                out.append(make_clip("speech", "espeak-ng", f"{voice}: {words}", "GPL-3+", piece, f"espeak-ng:{voice}"))
    return out


def self_rendered(seed: int, clips_each: int = 12) -> list[Clip]:
    """Sounds of our own making, for machines without packages and for tests; each clip is its own group."""
    out: list[Clip] = []
    for label in RENDERERS:
        for index in range(clips_each):
            wave = render(label, np.random.default_rng([seed, index, *label.encode()]))
            name = f"{label} {index}"
            wave = wave[: int(MAX_S * SAMPLE_RATE)]
            out.append(make_clip(label, "rendered", name, "Apache-2.0", wave, f"rendered:{name}"))
    return out


def state(given: str) -> list[tuple[str, int, int]]:
    """Name, size and date of each file of a folder of one's own, for what is made of it; empty for what is built in."""
    if given in ("packages", "rendered"):
        return []
    files = (path for path in sorted(Path(given).glob("*/*")) if path.suffix.lower() in packages.SOUND_SUFFIXES)
    return [(path.relative_to(given).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def from_folder(folder: Path) -> list[Clip]:
    """Clips of a folder of `label/clip.*`; a file is one group.

    Raises:
        ValueError: no such folder, or no readable sound in it.
    """
    if not folder.is_dir():
        raise ValueError(f"corpus.sources: no folder {folder} (give packages, rendered, or a folder of label/clip.*)")
    out: list[Clip] = []
    for path in sorted(folder.glob("*/*")):
        if path.suffix.lower() not in packages.SOUND_SUFFIXES:
            continue
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


def recorded_beds(folders: dict[str, Path], seed: int) -> list[Bed]:
    """Music tracks and ambiences of the packages; all excerpts of one track are in one split."""
    found: dict[str, list[Bed]] = {}
    for kind, package, pattern in BEDS:
        if package not in folders:
            continue
        licences = packages.Licences(package, folders[package])
        for path, source in packages.sounds(folders[package]):
            if re.search(pattern, "/" + path):
                try:
                    wave = packages.read_mono(source, max_s=BED_S)
                except soundfile.LibsndfileError as error:
                    log.info("%s: %s left out: %s", package, path, error)
                    continue
                bed = Bed(f"{package}:{path}", kind, "", package, path, licences.of(path), _levelled(wave))
                found.setdefault(kind, []).append(bed)
    return [bed for beds in found.values() for bed in _split_beds(beds, seed)]


def rendered_beds(seed: int, kinds: Iterable[str] = ("quiet", "noise")) -> list[Bed]:
    """Noise of many colours (and `music`: slow chords; `ambience`: swelling noise), half a minute each."""
    out: list[Bed] = []
    for kind in kinds:
        beds = []
        for index in range(1 if kind == "quiet" else 12):
            rng = np.random.default_rng([seed, 3, index, *kind.encode()])
            wave = pad_bed(rng) if kind == "music" else noise_bed(rng, swell=kind == "ambience")
            beds.append(
                Bed(f"rendered:{kind} {index}", kind, "", "rendered", f"{kind} {index}", "Apache-2.0", _levelled(wave))
            )
        out += [replace(beds[0], split=s) for s in SHARES] if kind == "quiet" else _split_beds(beds, seed)
    return out


def _split_beds(beds: list[Bed], seed: int) -> list[Bed]:
    """Two thirds train, one in twelve val (at least one), the rest test."""
    if len(beds) < 3:
        return [replace(bed, split="train") for bed in beds]
    splits = assign_splits({bed.id: 1 for bed in beds}, np.random.default_rng([seed, 4]))
    return [replace(bed, split=splits[bed.id]) for bed in beds]


def _levelled(wave: Wave) -> Wave:
    """RMS `LEVEL`, and its end faded into its start so that it can be looped."""
    fade = min(len(wave) // 4, SAMPLE_RATE)
    ramp = np.linspace(0, 1, fade, dtype=np.float32)
    looped = wave[: len(wave) - fade].copy()
    looped[:fade] = looped[:fade] * ramp + wave[len(wave) - fade :] * (1 - ramp)
    return np.asarray(looped * (LEVEL / max(float(np.sqrt((looped**2).mean())), 1e-6)), np.float32)


# --- The table ---------------------------------------------------------------------------------------------------


def write_table(clips: Iterable[Clip], beds: Iterable[Bed], path: Path) -> None:
    """Write `sources.csv`: where every clip and bed is from, under which licence, and what was measured."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for c in clips:
            row = (c.id, c.label, c.package, c.file, c.licence, c.split, f"{c.duration_s:.3f}")
            writer.writerow((*row, c.rms_db, c.centroid_hz, c.group))
        for b in beds:
            row = (b.id, f"({b.kind} bed)", b.package, b.file, b.licence, b.split, f"{len(b.wave) / SAMPLE_RATE:.3f}")
            writer.writerow((*row, "", "", b.id))
