"""Files as users' tools write them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from af2_ray.data.manifest import read_samples

Write = Callable[[str, Any], str]


def write_to(folder: Path) -> Write:
    """Function that writes rows (or a text) to a file of a name in the folder and returns its path."""

    def write(name: str, rows: Any) -> str:
        path = folder / name
        if isinstance(rows, str):
            path.write_text(rows, encoding="utf-8")
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif name.endswith(".json"):
            path.write_text(json.dumps(rows, indent=2))
        elif name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, list(rows[0]), dialect="excel-tab" if name.endswith(".tsv") else "excel")
                table.writeheader()
                table.writerows(rows)
        return str(path)

    return write


def refused(uri: str, **more: Any) -> str:
    """The message with which a manifest is refused."""
    with pytest.raises(ValueError) as caught:
        read_samples(uri, **more)
    return str(caught.value)


def turns(*texts: str, names: tuple[str, str] = ("from", "value")) -> list[dict[str, str]]:
    """Questions and answers in turn, as AF3 and ShareGPT have them."""
    roles = ("human", "gpt") if names[0] == "from" else ("user", "assistant")
    return [{names[0]: roles[place % 2], names[1]: text} for place, text in enumerate(texts)]


def chat(*texts: str) -> list[dict[str, str]]:
    """The same as messages."""
    return turns(*texts, names=("role", "content"))
