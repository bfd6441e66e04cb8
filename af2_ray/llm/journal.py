"""Replies kept on disk, so that a run that was stopped pays for nothing twice.

A reply lies under the SHA-256 of all that decides it (prompt, model, version of the check ...): another question is
another file, and nothing is ever thrown away or looked through. A file a reply costs an inode and some milliseconds of
`fsync`, little beside the seconds of a request.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from af2_ray.storage.files import write_whole


@dataclass(frozen=True)
class Journal:
    """A folder of replies, one JSON file each; processes and machines may share it."""

    folder: Path

    def read(self, deciding: Any) -> Any | None:
        """The reply to what these facts decide (anything of JSON); None where there is none."""
        path = self._path(deciding)
        return json.loads(path.read_text()) if path.is_file() else None

    def write(self, deciding: Any, reply: Any) -> None:
        """Keep a reply, whole or not at all."""
        write_whole(self._path(deciding), json.dumps(reply))

    def _path(self, deciding: Any) -> Path:
        name = hashlib.sha256(json.dumps(deciding).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"
