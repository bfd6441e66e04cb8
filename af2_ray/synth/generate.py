"""Caption sets for a whole file of captions, on the Ray cluster that is connected: in order, with what failed and why.

Captions travel in chunks, one to an actor at a time, and each actor has one request on its way: `concurrency` is the
number of requests that the endpoint sees at once. Chunks come back as they are done; those before the next one that is
due wait in memory, so OUT has the order of IN. It is written whole or not at all. A run that was stopped starts anew,
and takes what it has paid for from the engine's cache; the grammar needs none: it makes 500 sets a second and CPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from af2_ray.cluster import Actors, map_on_ray
from af2_ray.llm.client import Spent
from af2_ray.storage.files import put_in_place, temporary_of
from af2_ray.synth.captions.sets import CaptionEngine

Row = dict[str, Any]
MOST_IN_CHUNK = 64  # captions that are made anew when an actor is lost
_ACTOR_CPUS = 0.1  # an actor waits for its endpoint


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of captions, JSON objects with `name` and `caption`.

    Raises:
        ValueError: no such file, a line that is none (the message names it), or no captions.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not all(isinstance(row[key], str) for key in ("name", "caption")):
                raise TypeError("name and caption must be strings")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not an object with `name` and `caption`: {error}") from error
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no captions")
    return rows


def make_captions(rows: Sequence[Row], engine: CaptionEngine, out: Path, concurrency: int) -> tuple[int, Spent]:
    """Make the sets of all rows, and write them to `out`; rows without a set go to `failed_path(out)`, with the reason.

    Args:
        rows: objects that `read_rows` gave; keys other than the caption are kept.
        engine: maker of a set.
        out: file of caption sets, as training reads them.
        concurrency: number of actors, and of requests at a time.

    Returns:
        Number of captions without a set, and what all of it has cost.
    """
    size = max(1, min(MOST_IN_CHUNK, len(rows) // (4 * concurrency)))
    items = [
        {"chunk": chunk, "first": first, "rows": json.dumps(rows[first : first + size])}
        for chunk, first in enumerate(range(0, len(rows), size))
    ]
    done = map_on_ray(items, CaptionMaker, (engine,), Actors(concurrency, _ACTOR_CPUS))
    return _write(_in_order(done), out)


class CaptionMaker:
    """One actor: makes the sets of the chunks it is given."""

    def __init__(self, engine: CaptionEngine) -> None:
        self._engine = engine

    def __call__(self, row: Mapping[str, Any]) -> Row:
        """The sets of a chunk: rows with their set, or with a `reason` why there is none, and what they have cost.

        All of it travels as JSON, so that Arrow need not find a type for the rows of every chunk.
        """
        made = [self._set_of(each, number) for number, each in enumerate(json.loads(row["rows"]), int(row["first"]))]
        spent = json.dumps(self._engine.spent)
        self._engine.spent.clear()  # the next chunk counts its own
        return {"chunk": row["chunk"], "rows": json.dumps(made), "spent": spent}

    def _set_of(self, row: Row, number: int) -> tuple[Row, bool]:
        try:
            made = self._engine(row["caption"], number)
        except ValueError as error:
            return {**row, "reason": str(error)}, False
        return row | {"positives": made.paraphrases, "negatives": made.negatives}, True


def _in_order(chunks: Iterable[Row]) -> Iterator[Row]:
    waiting: dict[int, Row] = {}
    due = 0
    for chunk in chunks:
        waiting[int(chunk["chunk"])] = chunk
        while due in waiting:
            yield waiting.pop(due)
            due += 1


def _write(chunks: Iterable[Row], out: Path) -> tuple[int, Spent]:
    out.parent.mkdir(parents=True, exist_ok=True)
    num_failed, spent = 0, Spent()
    good, bad = temporary_of(out), temporary_of(failed_path(out))
    with good.open("w") as sets, bad.open("w") as failed:
        for chunk in chunks:
            spent.update(json.loads(chunk["spent"]))
            for row, is_good in json.loads(chunk["rows"]):
                (sets if is_good else failed).write(json.dumps(row, ensure_ascii=False) + "\n")
                num_failed += not is_good
    put_in_place(good, out)
    put_in_place(bad, failed_path(out))
    if not num_failed:
        failed_path(out).unlink()
    return num_failed, spent


def failed_path(out: Path) -> Path:
    """Where captions without a set go."""
    return out.with_name(f"{out.name}.failed.jsonl")
