"""Sounds of our own making, and the files that other programs make sounds from."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile

from af2_ray.synth.sounds import packages
from af2_ray.synth.sounds.catalogue import CLASSES
from af2_ray.synth.sounds.packages import Licences, read_rcc, sounds
from af2_ray.synth.sounds.render import RENDERERS, Phrase, midi_file, play, render, speak


def test_every_class_has_distinct_audible_clips() -> None:
    assert len(RENDERERS) >= 16
    for label in RENDERERS:
        waves = [render(label, np.random.default_rng(seed)) for seed in range(6)]
        assert len({wave.tobytes() for wave in waves}) == 6
        for wave in waves:
            assert 0.2 <= len(wave) / 16000 <= 2
            assert np.abs(wave).max() == pytest.approx(0.9, abs=1e-3)


def test_midi_file_has_one_phrase_a_slot() -> None:
    data = midi_file([Phrase(5, (60, 64), 90, 0.5), Phrase(8, (38,), 100, 0.5, drums=True)])
    assert data[:4] == b"MThd"
    assert struct.unpack(">IHHH", data[4:14]) == (6, 0, 1, 1000)
    assert struct.unpack(">I", data[18:22])[0] == len(data) - 22
    assert data.count(bytes([0x90, 60, 90])) == data.count(bytes([0x99, 38, 100])) == 1
    assert bytes([0xC0, 5]) in data
    assert bytes([0xC9, 8]) in data


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_speech_is_rendered() -> None:
    assert len(speak("hello", "en-us", pitch=50)) > 0.2 * 16000


def test_without_programs_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FileNotFoundError, match="fluidsynth"):
        play(Path("none.sf2"), [Phrase(0, (60,), 100, 0.5)])
    with pytest.raises(FileNotFoundError, match="espeak-ng"):
        speak("hello", "en-us", pitch=50)
    assert packages.fetch(Path("/nowhere/cache")) == {}


def archive(files: dict[str, bytes], compress: bool) -> bytes:
    """A Qt resource archive (format 1) with all files in one folder `sounds`."""
    names, data, tree = b"", b"", b""
    folder = "sounds"

    def name(text: str) -> int:
        nonlocal names
        at = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return at

    root = name("")
    tree += struct.pack(">IHII", root, 2, 1, 1)
    tree += struct.pack(">IHII", name(folder), 2, len(files), 2)
    for path, content in files.items():
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if compress else content
        tree += struct.pack(">IHHHI", name(path), 1 if compress else 0, 0, 0, len(data))
        data += struct.pack(">I", len(stored)) + stored
    head = 20
    offsets = (head, head + len(tree), head + len(tree) + len(data))
    return b"qres" + struct.pack(">IIII", 1, offsets[0], offsets[1], offsets[2]) + tree + data + names


@pytest.mark.parametrize("compress", [False, True])
def test_resource_archives_are_read(compress: bool) -> None:
    files = {"dog.ogg": b"woof" * 100, "cat.wav": b"meow"}
    assert read_rcc(archive(files, compress)) == {f"sounds/{name}": content for name, content in files.items()}
    with pytest.raises(ValueError, match="not a Qt resource archive"):
        read_rcc(b"RIFF....")


def test_sounds_of_a_package_and_their_licences(tmp_path: Path) -> None:
    (tmp_path / "usr/share/doc/scratch").mkdir(parents=True)
    (tmp_path / "usr/share/doc/scratch/copyright").write_text(
        "Files: *\nLicense: MIT\n\nFiles: media/Dog*.wav\n media/cat.ogg\nLicense: CC-BY-3.0\n"
    )
    soundfile.write(tmp_path / "Dog1.wav", np.zeros(100), 16000)
    (tmp_path / "notes.txt").write_text("no sound")
    (tmp_path / "all.rcc").write_bytes(archive({"cat.ogg": b"x"}, False))
    assert [path for path, _ in sounds(tmp_path)] == ["Dog1.wav", "all.rcc/sounds/cat.ogg"]
    licences = Licences("scratch", tmp_path)
    assert licences.of("a/Dog1.wav") == licences.of("all.rcc/sounds/cat.ogg") == "CC-BY-3.0"
    assert licences.of("a/bird.wav") == packages.PACKAGES["scratch"]


def test_the_catalogue_is_consistent() -> None:
    labels = [c.label for c in CLASSES]
    phrases = [phrase for c in CLASSES for phrase in c.phrases]
    assert len(set(labels)) == len(labels)
    assert len(set(phrases)) == len(phrases)
    assert all(label == label.lower() for label in labels)
    for c in CLASSES:
        assert {package for package, _ in c.files} <= set(packages.PACKAGES)
        assert not any(
            f" {word} " in f" {phrase} " for phrase in c.phrases for word in ("and", "then", "while", "with")
        )
