"""Answers to whole manifests, by Ray Data actors that hold the serving engine each: what labels a million clips.

The work is cut into chunks of questions about clips of like length, long ones first, all questions of a clip in one
chunk, so the engine's slots stay full and a clip is encoded once. A chunk's answers are one file, written when it is
whole: a job that was stopped goes on with the chunks that have none. At last the files are joined in input order.

Decoding runs in threads a little ahead of the engine: a bounded number of clips is in memory, whatever the chunk.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from af2_ray.audio.decode import AudioError, decode
from af2_ray.audio.windows import WINDOW_S, num_windows_for, to_windows
from af2_ray.config import Serve
from af2_ray.data.manifest import Sample, check_samples
from af2_ray.remote import version_of
from af2_ray.resources import own_device
from af2_ray.serve.engine import Engine
from af2_ray.serve.request import Answer, Clip, Event, Failure, Request
from af2_ray.storage import locate, open_text, write_text

logger = logging.getLogger(__name__)

Row = dict[str, Any]
"""What is told of a sample: `index`, `id`, `uri`, `prompt`, and `answer` with its counts, or `error`."""


@dataclass(frozen=True)
class Asked:
    """A sample of the input, by its place there."""

    index: int
    id: str
    uri: str
    offset_s: float
    duration_s: float
    prompt: str

    @property
    def clip_key(self) -> str:
        """The stretch of audio, as the engine keeps it."""
        return hashlib.sha256(f"{self.uri}@{self.offset_s}+{self.duration_s}".encode()).hexdigest()


def read_asked(
    samples: Sequence[Sample], question: str | None = None, unread: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[Asked], list[Row]]:
    """The questions of samples (or one question for all), and rows of those that cannot be asked.

    An answer is not needed: the samples of a manifest to be labelled have none. `unread` is as in `check_samples`.
    """
    indexed = [replace(sample, prompt=question or sample.prompt, answer="to come") for sample in samples]
    reasons = {id(sample): reason for sample, reason in check_samples(indexed, unread)[1]}
    asked, refused = [], []
    for index, sample in enumerate(indexed):
        one = Asked(index, sample.id, sample.uri, sample.offset_s, sample.duration_s, sample.prompt)
        if reason := reasons.get(id(sample)):
            refused.append(_row(one, error=reason))
        else:
            asked.append(one)
    return asked, refused


def plan_chunks(asked: Sequence[Asked], size: int, max_windows: int) -> list[list[Asked]]:
    """Chunks of about `size` questions, longest clips first; questions about one clip stay together."""
    clips: dict[tuple[int, str], list[Asked]] = {}
    for one in asked:
        clips.setdefault((-num_windows_for(one.duration_s, max_windows), one.clip_key), []).append(one)
    chunks: list[list[Asked]] = [[]]
    for key in sorted(clips):
        if len(chunks[-1]) >= size:
            chunks.append([])
        chunks[-1] += clips[key]
    return [chunk for chunk in chunks if chunk]


# --- Answering -----------------------------------------------------------------------------------------------------


def answer_all(
    engine: Engine, asked: Sequence[Asked], *, max_new_tokens: int, max_windows: int, num_threads: int = 2
) -> list[Row]:
    """Greedy answers, in the order of `asked`; each clip is decoded and encoded once (its first `max_windows`)."""
    rows: dict[int, Row] = {}
    clips = {one.clip_key: one for one in asked}
    ahead = 2 * engine.settings.num_slots  # clips that may be decoded before the engine takes them

    def listen(one: Asked, event: Event) -> None:
        if isinstance(event, Answer):
            counts = {"completion_tokens": event.completion_tokens, "finish_reason": event.finish_reason}
            rows[one.index] = _row(one, answer=event.text, **counts)
        elif isinstance(event, Failure):
            rows[one.index] = _row(one, error=event.message)

    questions: dict[str, list[Asked]] = {}
    for one in asked:
        questions.setdefault(one.clip_key, []).append(one)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        coming = _ahead(pool, ((key, partial(_read, one, max_windows)) for key, one in clips.items()), ahead)
        done = False
        while not done or engine.num_waiting or engine.num_running:
            while not done and engine.num_waiting < engine.settings.num_slots:
                found = next(coming, None)
                if found is None:
                    done = True
                    break
                key, clip = found
                for one in questions[key]:
                    if isinstance(clip, AudioError):
                        rows[one.index] = _row(one, error=f"{clip.reason}: {clip.detail}".rstrip(": "))
                    else:
                        request = Request(one.prompt, (clip,), max_new_tokens=max_new_tokens, id=one.id)
                        engine.submit(request, partial(listen, one))
            engine.step()
    return [rows[one.index] for one in asked]


def _read(one: Asked, max_windows: int) -> Clip | AudioError:
    heard_s = min(one.duration_s, float(max_windows * WINDOW_S))
    try:
        windows = to_windows(decode(one.uri, one.offset_s, heard_s), max_windows)
    except AudioError as error:
        return error
    return Clip.of(windows, one.clip_key, heard_s)


def _ahead(
    pool: ThreadPoolExecutor, calls: Iterable[tuple[str, Callable[[], Clip | AudioError]]], num: int
) -> Iterator[tuple[str, Clip | AudioError]]:
    """Results of `calls` in order, at most `num` of them being made or waiting."""
    running: list[tuple[str, Future[Clip | AudioError]]] = []
    for key, call in calls:
        running.append((key, pool.submit(call)))
        if len(running) >= num:
            first, future = running.pop(0)
            yield first, future.result()
    for key, future in running:
        yield key, future.result()


def _row(one: Asked, **more: Any) -> Row:
    return {"index": one.index, "id": one.id, "uri": one.uri, "prompt": one.prompt, **more}


class Labeller:
    """One actor: an engine, and the chunks it is given; a chunk's rows go to a file, its counts are returned."""

    def __init__(
        self, model: str, settings: Mapping[str, Any], folder: str, max_new_tokens: int, max_windows: int, threads: int
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        self._engine = Engine.from_pretrained(model, own_device(), Serve(**settings))
        self._folder, self._max_new_tokens, self._max_windows = folder, max_new_tokens, max_windows

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        """Answer the chunks of a batch of rows: `chunk` (its number) and `asked` (JSON)."""
        counts: dict[str, list[int]] = {"chunk": [], "answers": [], "errors": []}
        for number, text in zip(batch["chunk"], batch["asked"], strict=True):
            asked = [Asked(**one) for one in json.loads(text)]
            rows = answer_all(self._engine, asked, max_new_tokens=self._max_new_tokens, max_windows=self._max_windows)
            write_rows(part_uri(self._folder, int(number)), rows)
            errors = sum("error" in row for row in rows)
            for key, value in (("chunk", int(number)), ("answers", len(rows) - errors), ("errors", errors)):
                counts[key].append(value)
        return counts


def label(
    model: str,
    chunks: Sequence[Sequence[Asked]],
    folder: str,
    settings: Serve,
    *,
    num_actors: int,
    max_new_tokens: int,
    max_windows: int,
    progress: Callable[[int, int], None] = lambda answers, errors: None,
) -> None:
    """Answer the chunks that have no file in `folder` yet, on the Ray cluster that is connected.

    Args:
        num_actors: engines; each takes CPUs and GPUs as a replica of the server does (`auto`: one CPU, a GPU if any).
        progress: called with the counts of each chunk as it is done.
    """
    import ray.data

    there = parts_there(folder)
    items = [
        {"chunk": number, "asked": json.dumps([asdict(one) for one in chunk])}
        for number, chunk in enumerate(chunks)
        if number not in there
    ]
    if not items:
        return
    cpus, gpus = settings.cpus_per_replica, settings.gpus_per_replica
    if cpus == "auto":
        cpus = 1.0
    if gpus == "auto":
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
    done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Labeller,
        fn_constructor_args=(
            model,
            settings.model_dump(),
            folder,
            max_new_tokens,
            max_windows,
            max(1, int(cpus)),
        ),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(num_actors, len(items)), max_tasks_in_flight_per_actor=2),
        num_cpus=cpus,
        num_gpus=gpus or None,
    )
    for row in done.iter_rows():
        progress(int(row["answers"]), int(row["errors"]))


# --- Files ---------------------------------------------------------------------------------------------------------


def part_uri(folder: str, number: int) -> str:
    """Where a chunk's rows are."""
    return f"{folder}/chunk-{number:07d}.jsonl"


def model_facts(model: str) -> dict[str, Any]:
    """What tells an export from another one at the same address, and the windows it hears of a clip at most.

    Raises:
        ValueError: no model there.
    """
    fs, path = locate(model.rstrip("/"))
    fs.invalidate_cache()
    if not fs.exists(f"{path}/config.json"):
        raise ValueError(f"no model in {model}: name the folder that an export wrote, the one with config.json")
    files = {str(found["name"]).rsplit("/", 1)[-1]: found for found in fs.ls(path, detail=True)}
    kept = {name: found for name, found in sorted(files.items()) if name.endswith((".json", ".safetensors"))}
    version = [(name, version_of(found)) for name, found in kept.items()]
    mark = hashlib.sha256(json.dumps(version).encode()).hexdigest()[:16]
    return {"version": mark, "max_windows": json.loads(fs.cat_file(f"{path}/config.json")).get("max_windows")}


def parts_there(folder: str) -> set[int]:
    """Numbers of the chunks that are done."""
    fs, path = locate(folder)
    fs.invalidate_cache()  # actors in other processes write there
    if not fs.exists(path):
        return set()
    names = [str(file).rsplit("/", 1)[-1] for file in fs.ls(path, detail=False)]
    return {int(name[6:13]) for name in names if name.startswith("chunk-") and name.endswith(".jsonl")}


def write_rows(uri: str, rows: Iterable[Row]) -> None:
    """JSON lines, whole or not at all."""
    write_text(uri, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def join(folder: str, num_chunks: int, refused: Iterable[Row], out: str) -> tuple[int, int]:
    """All rows in input order to `out` (`.jsonl` or `.parquet`); how many, and how many have an answer.

    Raises:
        ValueError: a chunk is not there, or `out` has another ending.
    """
    if missing := sorted(set(range(num_chunks)) - parts_there(folder)):
        raise ValueError(
            f"{len(missing)} chunks of {folder} are not there, the first is {missing[0]}: run the job again"
        )
    rows = list(refused)
    for number in range(num_chunks):
        with open_text(part_uri(folder, number)) as file:
            rows += [json.loads(line) for line in file]
    rows.sort(key=lambda row: row["index"])
    if out.endswith(".jsonl"):
        write_rows(out, rows)
    elif out.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        keys = ("index", "id", "uri", "prompt", "answer", "completion_tokens", "finish_reason", "error")
        table = pyarrow.table({key: [row.get(key) for row in rows] for key in keys})
        fs, path = locate(out)
        with fs.open(path, "wb") as file:
            pyarrow.parquet.write_table(table, file)
    else:
        raise ValueError(f"{out!r}: name an output that ends in .jsonl or .parquet")
    return len(rows), sum(not row.get("error") for row in rows)
