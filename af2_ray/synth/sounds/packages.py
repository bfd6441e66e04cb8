"""Free sounds out of Debian's packages: download, unpack, read, and say under which licence.

`apt-get download` and `dpkg` need no root and install nothing. A machine without Debian's packages gets fewer
sounds (or none), and a warning that says so: the caller goes on with what it renders itself.
"""

from __future__ import annotations

import fnmatch
import io
import logging
import os
import re
import shutil
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from af2_ray.audio.windows import SAMPLE_RATE

log = logging.getLogger(__name__)

# Package -> licence of its sounds where its copyright file names none for the very file.
PACKAGES = {
    "scratch": "CC-BY-SA-3.0",
    "gcompris-qt-data": "GPL-3+ and free media licences, see the package",
    "minetest-data": "CC-BY-SA-3.0",
    "lmms-common": "GPL-2+",
    "sound-theme-freedesktop": "CC-BY-SA-3.0",
    "tuxpaint-stamps-default": "GPL-2",
    "sonic-pi-samples": "CC0",
    "singularity-music": "CC-BY-SA-3.0",
    "asterisk-moh-opsound-wav": "CC-BY-SA-3.0",
    "hydrogen-data": "GPL-2+",
    "timgm6mb-soundfont": "GPL-2",
    "fluidr3mono-gm-soundfont": "MIT",
    "csound-soundfont": "LGPL-2.1+",
}
SOUNDFONTS = ("timgm6mb-soundfont", "fluidr3mono-gm-soundfont", "csound-soundfont")
PROGRAMS = ("fluidsynth", "espeak-ng")
SOUND_SUFFIXES = (".ogg", ".oga", ".wav", ".flac", ".mp3", ".aif", ".aiff")


def fetch(cache: Path) -> dict[str, Path]:
    """Download every package of `PACKAGES` that can be had, and unpack its sounds.

    Args:
        cache: folder of the downloaded `*.deb` files; what is there is not downloaded again. `cache/unpacked` may be
            deleted when the sounds have been read.

    Returns:
        Package name -> its unpacked folder; a package that could not be had is missing (and warned about).
    """
    if shutil.which("dpkg") is None or shutil.which("apt-get") is None:
        log.warning("no apt-get here: going on without Debian's sound packages")
        return {}
    cache.mkdir(parents=True, exist_ok=True)
    for attempt in range(2):
        if not (wanted := [name for name in PACKAGES if not list(cache.glob(f"{name}_*.deb"))]):
            break
        if attempt and (os.geteuid() != 0 or not _run(["apt-get", "update"], cache, timeout_s=120)):
            break  # without package lists, and without the right to fetch them
        for name in wanted:
            _run(["apt-get", "download", name], cache, timeout_s=300)
    archives = {name: found[-1] for name in PACKAGES if (found := sorted(cache.glob(f"{name}_*.deb")))}
    folders = {name: cache / "unpacked" / name for name in archives}
    with ThreadPoolExecutor(2) as pool:
        readable = pool.map(_unpack, archives.values(), folders.values())
        folders = {name: folder for (name, folder), good in zip(folders.items(), readable, strict=True) if good}
    if missing := sorted(set(PACKAGES) - set(folders)):
        log.warning("going on without these packages: %s", ", ".join(missing))
    return folders


def _unpack(archive: Path, folder: Path) -> bool:
    """Write the sounds, sound fonts and the copyright file of a package (not its thousands of other files)."""
    wanted = re.compile(r"\.(ogg|oga|wav|flac|mp3|aiff?|rcc|sf[23])$|/copyright$", re.I)
    folder.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(["dpkg", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as members:
                for member in members:
                    if member.isfile() and wanted.search(member.name) and "_desc" not in member.name:
                        members.extract(member, folder, filter="data")
        except (tarfile.TarError, OSError) as error:
            log.warning("%s: not readable: %s", archive.name, error)
            return False
    return process.returncode == 0


def install_programs(folder: Path) -> tuple[str, ...]:
    """Names of fluidsynth and espeak-ng that can be called, after trying to install what is missing (needs root)."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        _run(["apt-get", "install", "-y", "--no-install-recommends", *missing], folder, timeout_s=300)
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        log.warning("going on without %s (apt-get install --no-install-recommends %s)", missing, " ".join(missing))
    return tuple(name for name in PROGRAMS if name not in missing)


def _run(command: list[str], folder: Path, timeout_s: float) -> bool:
    """Run a command in `folder`; False where it fails, with the reason in the log."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.info("%s: %s", " ".join(command[:3]), error)
        return False
    if done.returncode:
        log.info("%s failed: %s", " ".join(command[:3]), done.stderr.strip()[-200:])
    return done.returncode == 0


def sounds(folder: Path) -> Iterator[tuple[str, bytes | Path]]:
    """Every sound file of an unpacked package, in a fixed order: (path inside the package, bytes or path).

    Qt's resource archives (`*.rcc`) are looked into: `a/b.rcc/inner/dog.ogg`.
    """
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file():
            continue
        if path.suffix.lower() in SOUND_SUFFIXES:
            yield inside, path
        elif path.suffix == ".rcc":
            for name, content in sorted(read_rcc(path.read_bytes()).items()):
                if name.lower().endswith(SOUND_SUFFIXES):
                    yield f"{inside}/{name}", content


def read_rcc(archive: bytes) -> dict[str, bytes]:
    """Files of a Qt resource archive (format 1-3; zlib or stored; others are left out).

    Raises:
        ValueError: not such an archive.
    """
    if archive[:4] != b"qres":
        raise ValueError("not a Qt resource archive (no 'qres' at its start)")
    version, tree, data, names = struct.unpack(">IIII", archive[4:20])
    size = 22 if version >= 2 else 14
    out: dict[str, bytes] = {}

    def walk(node: int, prefix: str) -> None:
        at = tree + node * size
        name_at, flags = struct.unpack(">IH", archive[at : at + 6])
        length = struct.unpack(">H", archive[names + name_at : names + name_at + 2])[0] if node else 0
        start = names + name_at + 6
        path = prefix + archive[start : start + 2 * length].decode("utf-16-be")
        if flags & 2:  # a folder
            count, first = struct.unpack(">II", archive[at + 6 : at + 14])
            for child in range(first, first + count):
                walk(child, f"{path}/" if path else "")
            return
        begin = data + struct.unpack(">I", archive[at + 10 : at + 14])[0]
        content = archive[begin + 4 : begin + 4 + struct.unpack(">I", archive[begin : begin + 4])[0]]
        if flags & 1:
            out[path] = zlib.decompress(content[4:])
        elif not flags & 4:  # 4: zstandard, which none of our sounds uses
            out[path] = content

    walk(0, "")
    return out


def read_mono(source: bytes | Path, max_s: float | None = None) -> NDArray[np.float32]:
    """A sound file as mono 16 kHz, at most `max_s` seconds of it.

    Raises:
        soundfile.LibsndfileError: unreadable.
    """
    with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
        frames = -1 if max_s is None else int(max_s * file.samplerate)
        mono, rate = file.read(frames, dtype="float32", always_2d=True).mean(1), file.samplerate
    return mono if rate == SAMPLE_RATE else np.asarray(soxr.resample(mono, rate, SAMPLE_RATE), np.float32)


class Licences:
    """Licences by file, from a package's machine-readable copyright file (DEP-5), else the package's own."""

    def __init__(self, package: str, folder: Path) -> None:
        self.default = PACKAGES[package]
        path = folder / "usr/share/doc" / package / "copyright"
        text = path.read_text(errors="replace") if path.is_file() else ""
        self.rules: list[tuple[str, str]] = []
        for paragraph in re.split(r"\n\s*\n", text):
            files = re.search(r"^Files:((?:.|\n )*)", paragraph, re.M)
            licence = re.search(r"^License:\s*(\S.*)", paragraph, re.M)
            if files and licence:
                names = (pattern.rsplit("/", 1)[-1] for pattern in files.group(1).split())
                self.rules += [(name, licence.group(1).strip()) for name in names if "." in name and name != "*.*"]

    def of(self, path: str) -> str:
        """Licence of a file of the package."""
        name = path.rsplit("/", 1)[-1]
        return next(
            (licence for pattern, licence in reversed(self.rules) if fnmatch.fnmatch(name, pattern)), self.default
        )
