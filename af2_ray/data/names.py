"""Where the names in a manifest lead, and which of them are not followed."""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass

from af2_ray.storage.places import (
    NameRefused,
    check_name,
    is_remote,
    leads_up,
    parents_allowed,
)

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".m4a")
"""By which recordings are found in a folder; what they are in truth is decided by their content."""


@dataclass(frozen=True)
class Root:
    """Where a manifest's names lead.

    Attributes:
        folder: folder of the recordings.
        parents: whether `..` may lead out of it: the manifest is of this machine, and the recipe allows it.
    """

    folder: str
    parents: bool = False

    @classmethod
    def of(cls, manifest_uri: str, folder: str | None) -> Root:
        """The root of a manifest whose recordings are in `folder`; none: beside it (`folder_of`)."""
        folder = folder_of(manifest_uri) if folder is None else folder
        if leads_up(folder) and not is_remote(folder):
            folder = os.path.abspath(folder)  # so that a `..` which is left was in a name
        return cls(folder, parents_allowed() and not is_remote(manifest_uri))

    def below(self, path: str) -> Root:
        """The same for a folder that the manifest itself names."""
        return Root(self.join(path) if path else self.folder, self.parents)

    def join(self, name: str) -> str:
        """A name as a uri. One that is absolute or has a scheme stays; a `..` that is not allowed stays in sight."""
        if "://" in name or name.startswith(("/", "data:")):
            return posixpath.normpath(name) if self.parents and name.startswith("/") and leads_up(name) else name
        if not name:
            return ""  # not the folder itself
        if leads_up(name):
            inner = posixpath.normpath(name)
            if inner != ".." and not inner.startswith("../"):
                name = inner
            elif self.parents and not is_remote(self.folder):
                return os.path.abspath(f"{self.folder}/{name}")
        return f"{self.folder.rstrip('/')}/{name}"


def name_fault(uri: str) -> str:
    """Why a sample's uri is not opened, as a short stable reason; empty if it may be."""
    try:
        check_name(uri)
    except NameRefused as error:
        return error.reason
    return "name leads outside" if leads_up(uri) else ""


def split_uri(uri: str) -> tuple[str, str]:
    """Folder and stem of a uri."""
    folder, _, name = uri.rpartition("/")
    return folder or ".", name.split(".", 1)[0]


def folder_of(uri: str) -> str:
    """Where a manifest's audio is: beside it; for a folder, in it."""
    last = uri.rstrip("/").rsplit("/", 1)[-1]
    return split_uri(uri)[0] if "." in last else uri.rstrip("/")


def stem_of(uri: str) -> str:
    folder, stem = split_uri(uri.rstrip("/"))
    return f"{folder.rstrip('/').rsplit('/', 1)[-1]}/{stem}" if folder != "." else stem
