"""Recordings that a manifest has inside itself, as base64: written to files beside it, once, named by their digest.

Everything that hears a recording opens it by its name, in any process of a cluster. So a manifest `x/train.jsonl` gets
a folder `x/train.jsonl.clips`. That takes the recordings' bytes a second time, and a place that can be written.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cached_property
from typing import Any

from af2_ray.storage.places import locate, put_bytes


class InlineClips:
    """The files of one manifest's recordings.

    Args:
        manifest_uri: address of the manifest.
    """

    def __init__(self, manifest_uri: str) -> None:
        self.folder = f"{manifest_uri.rstrip('/')}.clips"

    def uri_of(self, data: str, form: str) -> str:
        """Where a recording is, written there if it is not yet.

        Args:
            data: bytes of an audio file in base64.
            form: suffix of its name, such as `wav`; what it is in truth is decided by its content.

        Raises:
            ValueError: `data` is not base64, `form` is no suffix, or the folder cannot be written.
        """
        if not re.fullmatch(r"[a-z0-9]{1,8}", form):
            raise ValueError(f"key 'format' must be a short name such as wav, got {form[:20]!r}")
        try:
            content = base64.b64decode(data, validate=True)
        except ValueError as error:
            raise ValueError(f"key 'data' must be a file in base64: {error}") from error
        name = f"{hashlib.sha256(content).hexdigest()[:32]}.{form}"
        if name not in self._names:
            try:
                put_bytes(*locate(f"{self.folder}/{name}"), content)
            except OSError as error:
                raise ValueError(
                    f"{self.folder} cannot be written ({error}), and an input_audio needs a file: put the manifest "
                    "where you may write, or write its recordings to files and name them in audio_url"
                ) from error
            self._names.add(name)
        return f"{self.folder}/{name}"

    @cached_property
    def _names(self) -> set[str]:
        fs: Any
        fs, path = locate(self.folder)
        return {entry.rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)} if fs.isdir(path) else set()
