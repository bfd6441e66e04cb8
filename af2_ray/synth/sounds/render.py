"""Sounds that we make ourselves: by numpy, by fluidsynth from a sound font, by espeak-ng.

Rendered sounds are exact (pitch, count, words) and free, but cleaner than recordings: a corpus made only of them is
easier than the world. They stand beside recordings, and they stand in for them where no package can be had.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from af2_ray.audio.windows import SAMPLE_RATE
from af2_ray.synth.sounds.curate import Wave
from af2_ray.synth.sounds.packages import read_mono

Generator = np.random.Generator

# --- numpy -------------------------------------------------------------------------------------------------------


def _time(duration_s: float) -> NDArray[np.float64]:
    return np.arange(int(duration_s * SAMPLE_RATE)) / SAMPLE_RATE


def _partials(
    duration_s: float, f0: float, ratios: Sequence[float], decay_s: float, tilt: float
) -> NDArray[np.float64]:
    """Sum of exponentially decaying partials; higher ones are softer by `tilt` and shorter."""
    t = _time(duration_s)
    return sum(
        ratio**-tilt * np.exp(-t * ratio**0.5 / decay_s) * np.sin(2 * np.pi * f0 * ratio * t)
        for ratio in ratios
        if f0 * ratio < 7800
    ) + np.zeros_like(t)


def _held(
    duration_s: float, f0: float, num_partials: int, tilt: float, attack_s: float, vibrato: float
) -> NDArray[np.float64]:
    """A held harmonic tone with an attack, a release and vibrato (relative depth)."""
    t = _time(duration_s)
    phase = 2 * np.pi * f0 * (t - vibrato / (2 * np.pi * 5.5) * np.cos(2 * np.pi * 5.5 * t))
    tone = sum(k**-tilt * np.sin(k * phase) for k in range(1, num_partials + 1) if k * f0 < 7800)
    envelope = np.clip(t / attack_s, 0, 1) * np.clip((duration_s - t) / 0.08, 0, 1)
    return tone * envelope


def _noise(rng: Generator, duration_s: float, low_hz: float, high_hz: float) -> NDArray[np.float64]:
    """White noise between two frequencies."""
    num = int(duration_s * SAMPLE_RATE)
    spectrum = np.fft.rfft(rng.standard_normal(num))
    hz = np.fft.rfftfreq(num, 1 / SAMPLE_RATE)
    spectrum[(hz < low_hz) | (hz > high_hz)] = 0
    noise = np.fft.irfft(spectrum, num)
    return noise / (np.std(noise) + 1e-12)


def _sweep(duration_s: float, start_hz: float, end_hz: float) -> NDArray[np.float64]:
    """A tone that glides exponentially."""
    t = _time(duration_s) / duration_s
    return np.sin(2 * np.pi * np.cumsum(start_hz * (end_hz / start_hz) ** t) / SAMPLE_RATE)


def _bell(rng: Generator) -> NDArray[np.float64]:
    return _partials(1.4, rng.uniform(500, 1100), (0.5, 1, 1.19, 1.56, 2, 2.66, 3.01, 4.1), rng.uniform(0.4, 0.9), 0.7)


def _drum(rng: Generator) -> NDArray[np.float64]:
    t = _time(0.5)
    base = rng.uniform(45, 75)
    phase = np.cumsum(base * (1 + rng.uniform(1.5, 4) * np.exp(-t * 35))) / SAMPLE_RATE
    return np.sin(2 * np.pi * phase) * np.exp(-t / rng.uniform(0.08, 0.16))


def _snare(rng: Generator) -> NDArray[np.float64]:
    t = _time(0.4)
    return _noise(rng, 0.4, 800, 7500) * np.exp(-t / rng.uniform(0.05, 0.1)) + 1.5 * np.sin(
        2 * np.pi * rng.uniform(160, 230) * t
    ) * np.exp(-t / 0.04)


def _cymbal(rng: Generator) -> NDArray[np.float64]:
    return _noise(rng, 1.8, rng.uniform(3500, 4500), 8000) * np.exp(-_time(1.8) / rng.uniform(0.4, 0.8))


def _flute(rng: Generator) -> NDArray[np.float64]:
    f0 = rng.uniform(600, 1300)
    return _held(1.0, f0, 3, 2.2, 0.08, 0.004) + 0.03 * _noise(rng, 1.0, 500, 5000)


def _organ(rng: Generator) -> NDArray[np.float64]:
    f0 = rng.uniform(130, 260)
    return np.sum([_held(1.2, f0 * ratio, 2, 1.5, 0.02, 0.0) for ratio in (1, 1.26, 1.5, 2, 4)], axis=0)


def _trumpet(rng: Generator) -> NDArray[np.float64]:
    return _held(0.9, rng.uniform(250, 520), 16, rng.uniform(0.5, 0.8), 0.04, 0.003)


def _violin(rng: Generator) -> NDArray[np.float64]:
    return _held(1.3, rng.uniform(280, 700), 20, 1.0, 0.2, 0.012)


def _piano(rng: Generator) -> NDArray[np.float64]:
    return _partials(1.2, rng.uniform(150, 520), (1, 2.001, 3.003, 4.01, 5.02, 6.03), 0.5, 1.1)


def _xylophone(rng: Generator) -> NDArray[np.float64]:
    return _partials(0.4, rng.uniform(700, 1800), (1, 3.0, 6.2), 0.07, 0.6)


def _bass(rng: Generator) -> NDArray[np.float64]:
    return _partials(0.9, rng.uniform(42, 90), tuple(range(1, 12)), 0.4, 0.7)


def _siren(rng: Generator) -> NDArray[np.float64]:
    low, high = rng.uniform(450, 600), rng.uniform(1100, 1500)
    return np.concatenate([_sweep(0.5, low, high), _sweep(0.5, high, low), _sweep(0.5, low, high)])


def _laser(rng: Generator) -> NDArray[np.float64]:
    return _sweep(0.35, rng.uniform(4500, 7000), rng.uniform(150, 400)) * np.linspace(1, 0.3, int(0.35 * SAMPLE_RATE))


def _phone(rng: Generator) -> NDArray[np.float64]:
    t, low = _time(1.0), rng.uniform(900, 1200)
    return np.sin(2 * np.pi * np.cumsum(np.where((t * rng.uniform(16, 24)) % 1 < 0.5, low, low * 1.3)) / SAMPLE_RATE)


def _bird(rng: Generator) -> NDArray[np.float64]:
    top = rng.uniform(4200, 6500)
    chirp = _sweep(0.09, top, top * rng.uniform(0.5, 0.7)) * np.hanning(int(0.09 * SAMPLE_RATE))
    return np.concatenate([np.pad(chirp, (0, int(0.04 * SAMPLE_RATE))) for _ in range(int(rng.integers(4, 8)))])


def _wind(rng: Generator) -> NDArray[np.float64]:
    return _noise(rng, 1.6, 150, rng.uniform(700, 1100)) * np.hanning(int(1.6 * SAMPLE_RATE))


def _engine(rng: Generator) -> NDArray[np.float64]:
    t, rate = _time(1.3), rng.uniform(22, 38)
    return _noise(rng, 1.3, 80, 2500) * (0.15 + ((t * rate) % 1 < 0.25)) + np.sin(2 * np.pi * rate * 4 * t)


def _beep(rng: Generator) -> NDArray[np.float64]:
    return np.sign(np.sin(2 * np.pi * rng.uniform(1700, 2600) * _time(0.5))) * 1.0


def _frog(rng: Generator) -> NDArray[np.float64]:
    t, f0 = _time(0.6), rng.uniform(380, 620)
    return np.sin(2 * np.pi * f0 * t) * np.abs(np.sin(2 * np.pi * rng.uniform(14, 20) * t)) ** 3


def _water(rng: Generator) -> NDArray[np.float64]:
    out = np.zeros(int(1.2 * SAMPLE_RATE))
    for _ in range(26):
        start_hz = rng.uniform(500, 1500)
        drop = _sweep(0.05, start_hz, start_hz * 2) * np.hanning(int(0.05 * SAMPLE_RATE))
        at = int(rng.integers(0, len(out) - len(drop)))
        out[at : at + len(drop)] += drop * rng.uniform(0.3, 1)
    return out


RENDERERS: dict[str, Callable[[Generator], NDArray[np.float64]]] = {
    "bell": _bell,
    "drum": _drum,
    "snare": _snare,
    "cymbal": _cymbal,
    "flute": _flute,
    "organ": _organ,
    "trumpet": _trumpet,
    "violin": _violin,
    "piano": _piano,
    "xylophone": _xylophone,
    "bass": _bass,
    "siren": _siren,
    "laser": _laser,
    "phone": _phone,
    "bird": _bird,
    "wind": _wind,
    "engine": _engine,
    "beep": _beep,
    "frog": _frog,
    "water": _water,
}


def render(label: str, rng: Generator) -> Wave:
    """One sound of a class of `RENDERERS`, peak 0.9, 16 kHz."""
    wave = np.asarray(RENDERERS[label](rng))
    fade = np.minimum(1, np.arange(len(wave), 0, -1) / (0.01 * SAMPLE_RATE))
    return np.asarray(0.9 * wave * fade / np.abs(wave).max(), np.float32)


def noise_bed(rng: Generator, *, swell: bool = False, duration_s: float = 30.0) -> Wave:
    """Noise of a random colour (white to brown); with `swell` it comes and goes like wind or surf."""
    num = int(duration_s * SAMPLE_RATE)
    spectrum = np.fft.rfft(rng.standard_normal(num))
    hz = np.maximum(np.fft.rfftfreq(num, 1 / SAMPLE_RATE), 30)
    wave = np.fft.irfft(spectrum * hz ** -rng.uniform(0, 1.2), num)
    if swell:
        knots = rng.uniform(0.3, 1, int(duration_s / 2))
        wave *= np.interp(np.arange(num), np.linspace(0, num, len(knots)), knots)
    return np.asarray(wave / np.abs(wave).max(), np.float32)


def pad_bed(rng: Generator, duration_s: float = 32.0, chord_s: float = 4.0) -> Wave:
    """Slow soft chords: a stand-in for music."""
    root = rng.uniform(90, 160)
    chords = [
        sum(_held(chord_s, root * 2 ** (step / 12) * ratio, 4, 1.5, 1.0, 0.002) for ratio in (1, 1.26, 1.5, 2))
        for step in rng.choice([0, 3, 5, 7, 8, 10], int(duration_s / chord_s))
    ]
    wave = np.concatenate(chords)
    return np.asarray(wave / np.abs(wave).max(), np.float32)


# --- fluidsynth --------------------------------------------------------------------------------------------------

SLOT_S = 2.5  # one phrase in every slot of a rendered file
TICKS_PER_S = 1000


@dataclass(frozen=True)
class Phrase:
    """A few notes one after the other on one program: MIDI keys (or drum keys), velocity, seconds a note."""

    program: int
    keys: tuple[int, ...]
    velocity: int
    note_s: float
    drums: bool = False


def play(soundfont: Path, phrases: Sequence[Phrase]) -> list[Wave]:
    """Render phrases with a General MIDI sound font, in one run of fluidsynth.

    Returns:
        One wave of `SLOT_S` seconds a phrase, 16 kHz mono, with the decay of its last note.

    Raises:
        FileNotFoundError: fluidsynth is not on PATH.
        ValueError: fluidsynth failed; the message has its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        midi, wav = Path(folder, "in.mid"), Path(folder, "out.wav")
        midi.write_bytes(midi_file(phrases))
        command = ["fluidsynth", "-ni", "-q", "-g", "0.6", "-R", "0", "-C", "0", "-r", str(SAMPLE_RATE)]
        command += ["-F", str(wav), str(soundfont), str(midi)]
        mono = _written_by(command, wav, timeout_s=300)
    slot = int(SLOT_S * SAMPLE_RATE)
    mono = np.pad(mono, (0, max(0, slot * len(phrases) - len(mono))))
    return [mono[index * slot : (index + 1) * slot] for index in range(len(phrases))]


def midi_file(phrases: Sequence[Phrase]) -> bytes:
    """A format-0 MIDI file: the phrases, one in each slot; what still rings at a slot's end is cut off there."""
    events: list[tuple[int, bytes]] = []
    for index, phrase in enumerate(phrases):
        channel = 9 if phrase.drums else 0
        tick = int(index * SLOT_S * TICKS_PER_S)
        events.append((max(0, tick - 5), bytes([0xC0 | channel, phrase.program])))
        for key in phrase.keys:
            events.append((tick, bytes([0x90 | channel, key, phrase.velocity])))
            tick += int(phrase.note_s * TICKS_PER_S)
            events.append((tick, bytes([0x80 | channel, key, 0])))
        stop = int((index + 1) * SLOT_S * TICKS_PER_S) - 10
        events.append((stop, bytes([0xB0 | channel, 120, 0])))  # all sound off
    events.append((int(len(phrases) * SLOT_S * TICKS_PER_S), b"\xff\x2f\x00"))
    track, now = b"\x00\xff\x51\x03" + (1_000_000).to_bytes(3, "big"), 0
    for tick, message in events:
        track += _variable_length(tick - now) + message
        now = tick
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, TICKS_PER_S) + b"MTrk" + struct.pack(">I", len(track)) + track


def _variable_length(number: int) -> bytes:
    out = bytes([number & 0x7F])
    while number := number >> 7:
        out = bytes([0x80 | number & 0x7F]) + out
    return out


# --- espeak-ng ---------------------------------------------------------------------------------------------------


def speak(words: str, voice: str, pitch: int) -> Wave:
    """Words spoken by espeak-ng, 16 kHz mono.

    Raises:
        FileNotFoundError: espeak-ng is not on PATH.
        ValueError: espeak-ng failed; the message has its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder, "out.wav")
        command = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", "150", "-w", str(wav), words]
        return _written_by(command, wav, timeout_s=60)


def _written_by(command: Sequence[str], wav: Path, timeout_s: float) -> Wave:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode or not wav.is_file():
        raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip()[-200:]}")
    return read_mono(wav)
