"""Where a name leads: the one place where an address becomes a file system and a path.

A manifest comes from somebody else, and what it names is opened by workers that hold credentials. fsspec follows far
more than paths: chains (`zip://a::http://b`), files that are lists of other addresses, any host. So a name is a path of
this machine or an address of a scheme that is on a short list (`file`, `s3`, `gs` where its package is there, and what
a recipe adds in `access.schemes`), and nothing else; it leads to a regular file, and no read of a recording in a store
takes longer than `READ_S`. Other reads of stores have the limits of the store's own client.

The list is the same in all processes of a job: `allow` writes it to the environment, which Ray's workers get, too.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from af2_ray.storage.files import write_whole

ResultT = TypeVar("ResultT")

SCHEMES = ("file", "s3", "gs") if find_spec("gcsfs") else ("file", "s3")
READ_S = 45.0  # of one request to a store, of at most 8 MiB; tried once more
MAX_CHARACTERS = 4096  # Linux takes no longer path, S3 no longer key than 1024 bytes
_SHOWN = 120  # characters of a name in a message

_SCHEMES_VARIABLE, _PARENTS_VARIABLE = "AF2_SCHEMES", "AF2_PARENT_NAMES"
UNUSUAL_NAME = r"[\x00-\x1f\x7f-\x{9f}\x{2028}\x{2029}]|::|\{\{|\}\}|\$\{|\.\.|^\s*$|^data:"
PLAIN_ADDRESS = rf"^({'|'.join(SCHEMES)})://"
"""In RE2's syntax, for columns: `check_name` takes a name that is short enough, has nothing unusual, and has no `://`
or begins as a plain address; about others it is asked."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # the last are halves of characters
_TEMPLATE = re.compile(r"\{\{|\}\}|\$\{")


class NameRefused(ValueError):
    """A name that is not opened.

    Attributes:
        name: the name, in full.
        reason: short stable text, for counting: `empty name`, `name too long`, `control characters in name`, `chained
            name`, `template in name`, `scheme not allowed`, `name leads outside`, `not a regular file`.
        detail: advice on what mends it.
    """

    def __init__(self, name: str, reason: str, detail: str) -> None:
        super().__init__(name, reason, detail)
        self.name, self.reason, self.detail = name, reason, detail

    def __str__(self) -> str:
        return f"{shown(self.name)}: {self.reason}: {self.detail}"


def shown(name: str) -> str:
    """A name as a message may show it: on one line, cut where it is long."""
    plain = _CONTROL.sub("?", name.encode(errors="replace").decode())
    return plain if len(plain) <= _SHOWN else f"{plain[:_SHOWN]}... ({len(plain)} characters)"


# --- What is allowed ---------------------------------------------------------------------------------------------


def allow(schemes: tuple[str, ...] | list[str], *, parents: bool = False) -> None:
    """Let this process and the Ray workers it starts open addresses of more schemes.

    Args:
        schemes: schemes beside those of `SCHEMES`; fsspec must know them.
        parents: whether names in local manifests may lead out of the folder of the recordings by `..`.
    """
    added = {*_added_schemes(), *schemes} - {*SCHEMES}
    if added:
        os.environ[_SCHEMES_VARIABLE] = ",".join(sorted(added))
    if parents:
        os.environ[_PARENTS_VARIABLE] = "1"


def environment() -> dict[str, str]:
    """The variables by which `allow` reaches other processes."""
    return {name: os.environ[name] for name in (_SCHEMES_VARIABLE, _PARENTS_VARIABLE) if name in os.environ}


def parents_allowed() -> bool:
    """Whether `allow` was called with `parents`."""
    return os.environ.get(_PARENTS_VARIABLE) == "1"


def _added_schemes() -> tuple[str, ...]:
    return tuple(filter(None, os.environ.get(_SCHEMES_VARIABLE, "").split(",")))


# --- From a name to a place --------------------------------------------------------------------------------------


def is_remote(name: str | Path) -> bool:
    """Whether a name is an address such as `s3://bucket/folder`, not a path of this machine."""
    return "://" in str(name)


def check_name(name: str) -> None:
    """Refuse a name by its text alone; nothing is opened.

    Raises:
        NameRefused: see its reasons.
    """
    if not name.strip():
        raise NameRefused(name, "empty name", "name a file")
    if len(name) > MAX_CHARACTERS:
        raise NameRefused(name, "name too long", f"{MAX_CHARACTERS} characters are the most")
    if _CONTROL.search(name):
        raise NameRefused(name, "control characters in name", "rename the file: no line breaks, no broken Unicode")
    if "::" in name:
        raise NameRefused(name, "chained name", "name the file itself: addresses within addresses are not followed")
    if _TEMPLATE.search(name):
        raise NameRefused(name, "template in name", "write the name out: nothing is filled in")
    scheme, mark, rest = name.partition("://")
    if not mark:
        if name.startswith("data:"):  # the one scheme that fsspec takes without slashes
            raise NameRefused(name, "scheme not allowed", "write the recording to a file")
        return
    if scheme not in (*SCHEMES, *_added_schemes()):
        allowed = ", ".join((*SCHEMES, *_added_schemes()))
        mend = "gs needs the package gcsfs" if scheme == "gs" else "a recipe adds more in access.schemes"
        raise NameRefused(name, "scheme not allowed", f"allowed are {allowed}; {mend}")
    if scheme != "file" and leads_up(rest):
        raise NameRefused(name, "name leads outside", "write the address without '..'")


def leads_up(path: str) -> bool:
    """Whether a path has a part `..`."""
    return ".." in path and ".." in path.split("/")


def locate(name: str | Path) -> tuple[Any, str]:
    """The file system of fsspec and the path in it that a name stands for; the file need not exist.

    Raises:
        NameRefused: the name is not allowed, or is that of a pipe, a device or a socket.
    """
    text = str(name)
    check_name(text)
    try:
        fs, path = fsspec.url_to_fs(text)
    except ImportError as error:
        raise NameRefused(text, "scheme not allowed", f"its package is not installed: {error}") from error
    check_regular(fs, path)
    return fs, path


def check_regular(fs: Any, path: str) -> None:
    """Refuse a path that leads to a pipe, a device or a socket: reading may never end, and opening do anything.

    `locate` does so; what is found below or beside a located place is to be checked, too.

    Raises:
        NameRefused: it does.
    """
    if not is_local(fs):
        return
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # not there, or not to be seen: opening it says why
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise NameRefused(path, "not a regular file", "name a file or a folder")


def is_local(fs: Any) -> bool:
    """Whether a file system of fsspec is that of this machine."""
    return isinstance(fs, LocalFileSystem)


def open_local(name: str) -> IO[bytes]:
    """Open a file of this machine for reading, if it is a regular one; opening never waits.

    Raises:
        NameRefused: the name is not allowed, or not that of a regular file.
        OSError: as in `open`.
    """
    check_name(name)
    path = name.removeprefix("file://")
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{shown(name)} is a folder")
    if not stat.S_ISREG(mode):
        raise NameRefused(name, "not a regular file", "name a file")
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # should it be a pipe by now
    return os.fdopen(number, "rb")


@contextmanager
def open_text(name: str | Path, *, encoding: str = "utf-8", newline: str | None = None) -> Iterator[IO[str]]:
    """Open a text for reading, wherever it is; one that ends in `.gz` and the like is unpacked.

    Raises:
        NameRefused: see `locate`.
        FileNotFoundError: no such file.
    """
    fs, path = locate(name)
    with fs.open(path, "rt", encoding=encoding, newline=newline, compression="infer") as file:
        yield file


def write_text(name: str | Path, text: str) -> None:
    """Write a text whole or not at all: a file of this machine gets its name last, an object appears when it is whole.

    Raises:
        NameRefused: see `locate`.
        OSError: the place cannot be written.
    """
    put_text(*locate(name), text)


def put_text(fs: Any, path: str, text: str) -> None:
    """`write_text` for a place that is located."""
    put_bytes(fs, path, text.encode())


def put_bytes(fs: Any, path: str, data: bytes) -> None:
    """`put_text` for what is no text."""
    if is_local(fs):
        write_whole(Path(path), data)
    else:
        fs.pipe_file(path, data)


def inner_name(name: str) -> str:
    """A file's name below a folder as a store or an archive lists it, fit to be joined to a folder of this machine.

    Raises:
        ValueError: joined, it could lead out of that folder, or it can be no file's name there.
    """
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or _CONTROL.search(name) or any(part in ("", ".", "..") for part in parts):
        raise ValueError(
            f"{shown(name)!r} is no name of a file below a folder (no '..', empty part or backslash, not absolute): "
            "remove or rename it where it is stored"
        )
    if any(len(part.encode(errors="replace")) > 255 for part in parts) or len(name) > MAX_CHARACTERS // 2:
        raise ValueError(f"{shown(name)!r} is too long for a file of this machine: rename it where it is stored")
    return name


# --- Time --------------------------------------------------------------------------------------------------------


class Late(TimeoutError):
    """A call that took longer than it was given."""


def within(seconds: float, call: Callable[[], ResultT]) -> ResultT:
    """What `call` returns or raises.

    Raises:
        Late: it takes longer. The call then goes on in a thread of its own, and its result is dropped.
    """
    answer: Future[ResultT] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # raised again below, in the thread that asked
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True, name="storage").start()
    if wait([answer], seconds).not_done:
        raise Late(f"no answer within {seconds:g} s")
    return answer.result()
