"""Model folders, wherever they are."""

from __future__ import annotations

from pathlib import Path

import fsspec


def local_folder(folder: str, scratch: Path) -> str:
    """A local path of the model folder, fetched if it is remote."""
    if "://" in folder:
        fs, path = fsspec.url_to_fs(folder)
        fs.get(path.rstrip("/") + "/", str(scratch), recursive=True)
        folder = str(scratch)
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"no model in {folder!r}: name the folder that an export wrote, the one with config.json")
    return folder
