"""Files of this machine that survive: written whole or not at all, on the disk before they count, with their digest.

A rename alone does not survive a power cut: the name may reach the disk before the bytes do. So each file is flushed to
the disk (`fsync`) before it gets its name, and its folder after. That costs some milliseconds a file, for what is
written once a step or a checkpoint. A digest (SHA-256) shows damage, not authorship: who can change a file can change
its digest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

DIGESTS = "digests.json"  # of the files of a folder, within it
_SEAL = re.compile(rb'(.*(?:"seal": "|# seal: )sha256-)([0-9a-f]{64})("\n}\n|\n)', re.DOTALL)
_SIGN = re.compile(rb'"seal":|# seal:|sha256-[0-9a-f]{8}')  # of a seal: a flipped bit breaks one at most
_TAIL = 100  # bytes in which a seal is
LEFTOVER = re.compile(r"\.(?P<name>.+)\.af2-(?P<writer>\d+|old)|\.(model|start)\.\d+")
"""Names of what a killed writer leaves; the latter are of older versions."""


class Damaged(ValueError):
    """A file is not as it was written. The message names it and what mends it."""


# --- Writing -----------------------------------------------------------------------------------------------------


def write_whole(path: Path, text: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part, after a power cut too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        with _opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as number:
            _write(number, text.encode() if isinstance(text, str) else text)
        put_in_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_of(path: Path) -> Path:
    """Where this process writes what will be `path`; what a kill leaves there is removed by `remove_leftovers`."""
    return path.with_name(f".{path.name}.af2-{os.getpid()}")


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a written file its name, once its bytes are on the disk."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Add lines to a file, all of them or, where that fails, none; a line that was cut before costs itself alone."""
    data = "".join(f"{line}\n" for line in lines).encode()
    if not data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with _opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as number:
        size = os.fstat(number).st_size
        if size and os.pread(number, 1, size - 1) != b"\n":
            data = b"\n" + data
        try:
            _write(number, data)
            os.fsync(number)
        except OSError:
            os.ftruncate(number, size)
            raise
    if is_new:
        sync(path.parent)


def _write(number: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(number, left) :]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where there is no file. What is no whole object is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut by a kill
        if isinstance(row, dict):
            rows.append(row)
    return rows


def replace_folder(new: Path, folder: Path) -> None:
    """Let a finished folder take the place of `folder`, all that is in it on the disk; a kill leaves one of the two."""
    for below, _, names in os.walk(new):
        for name in names:
            sync(Path(below) / name)
        sync(Path(below))
    old = folder.with_name(f".{folder.name}.af2-old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def link(source: Path | str, target: Path | str) -> None:
    """Put a file that is never written to again under a second name: a hard link, or a copy where there are none."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def remove_leftovers(root: Path) -> list[Path]:
    """Remove what killed writers left below a folder, which must have none at work; their paths.

    An old folder whose successor never got its name takes its place again.
    """
    removed = []
    for below, folders, names in os.walk(root):
        for name in [*folders, *names]:
            found, path = LEFTOVER.fullmatch(name), Path(below) / name
            if not found:
                continue
            if found["writer"] == "old" and not (Path(below) / found["name"]).exists():
                os.rename(path, Path(below) / found["name"])
            else:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                removed.append(path)
        folders[:] = [name for name in folders if not name.startswith(".")]
    return removed


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    with _opened(path, os.O_RDONLY) as number:
        os.fsync(number)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """A file's descriptor, for `os.write` and `os.fsync`, closed when the block ends."""
    number = os.open(path, flags, 0o644)
    try:
        yield number
    finally:
        os.close(number)


# --- Digests -----------------------------------------------------------------------------------------------------


def sealed_json(facts: Mapping[str, Any]) -> str:
    """Facts as JSON with a digest of its own bytes as the last key, `seal`."""
    body = json.dumps(dict(facts), indent=1).removesuffix("}").rstrip()
    return _sealed(body + (",\n" if facts else "\n") + ' "seal": "sha256-', '"\n}\n')


def sealed_yaml(text: str) -> str:
    """YAML with a digest of its own bytes in a comment at its end."""
    return _sealed(f"{text.rstrip()}\n# seal: sha256-", "\n")


def _sealed(before: str, after: str) -> str:
    return before + hashlib.sha256((before + after).encode()).hexdigest() + after


def check_seal(name: str, data: bytes) -> bool:
    """Whether a text has a digest at its end (older ones have none), and it is right.

    Raises:
        Damaged: the digest is not that of the text, or there is no text.
    """
    if not data.strip():
        raise Damaged(f"{name} is empty")
    found = _SEAL.fullmatch(data)
    if found is None:
        if _SIGN.search(data[-_TAIL:]):
            raise Damaged(f"{name} is damaged: the digest at its end cannot be read")
        return False
    before, digest, after = found.groups()
    if hashlib.sha256(before + after).hexdigest() != digest.decode():
        raise Damaged(f"{name} is damaged: it is not as it was written (by its SHA-256)")
    return True


def unsealed(name: str, data: bytes) -> tuple[dict[str, Any], bool]:
    """The facts of a JSON object, and whether it had a digest.

    Raises:
        Damaged: it is no JSON object, or not as it was written.
    """
    had = check_seal(name, data)
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} is damaged: not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise Damaged(f"{name} is damaged: no object of JSON")
    if had:
        del facts["seal"]
    return facts, had


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(folder: Path) -> None:
    """Write the digests of a folder's files into it, except of texts that people edit (`.md`)."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    digests = {str(path.relative_to(folder)): digest(path) for path in paths if path.name != DIGESTS}
    (folder / DIGESTS).write_text(sealed_json({"files": digests}))


def check_digests(folder: Path) -> None:
    """Check the files of a folder against its digests, if it has any.

    Raises:
        Damaged: a file is missing or is not as it was written; the message names it.
    """
    path = folder / DIGESTS
    if not path.is_file():
        return
    facts, _ = unsealed(str(path), path.read_bytes())
    for name, wanted in facts.get("files", {}).items():
        file = folder / name
        if not file.is_file():
            raise Damaged(f"{file} is missing: it was written with the other files of {folder}")
        if digest(file) != wanted:
            raise Damaged(
                f"{file} is damaged or was changed: it is not as it was written (by its SHA-256 in {path}); put back a "
                f"copy, or make it anew. Where the change was meant, remove {path}"
            )


def read_json(path: Path) -> dict[str, Any] | None:
    """The facts in a JSON file; none where there is no file. A damaged one is named in a warning and counts as none."""
    if not path.is_file():
        return None
    try:
        return unsealed(str(path), path.read_bytes())[0]
    except Damaged as error:
        logger.warning("%s: it counts as not there", error)
        return None
