"""Answers to many questions by the serving engine: whole manifests, in this process or on the actors of a Ray cluster.

The work is cut into chunks of questions about clips of like length, long ones first, all questions of a clip in one
chunk, so the engine's slots stay full and a clip is encoded once. A job that labels a million clips keeps a file a
chunk, written when it is whole: after a stop it goes on with the chunks that have no file. At last the files are joined
in input order.

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

from af2_ray.audio.decode import AudioError
from af2_ray.audio.hear import Stretch, hear
from af2_ray.cluster import Actors, map_on_ray, own_device
from af2_ray.config import Serve
from af2_ray.data.samples import Sample, check_samples, messages_of
from af2_ray.engine.engine import Engine
from af2_ray.engine.request import Answer, Clip, Event, Request, RequestFailure
from af2_ray.storage.places import locate, open_text, write_text
from af2_ray.storage.stores import version_of
from af2_ray.text import CHAT_TEMPLATE, TEMPLATE_FILE, Message, known_template

logger = logging.getLogger(__name__)

REFUSED, FAILED = "refused", "failed"  # reasons of results
_AHEAD = 16  # clips that may be decoded before the engine takes them, up to 10 MB each
_OFFLINE_TIMEOUT_S = 86_400.0  # nobody waits at the other end
_Decoded = tuple[tuple[Clip, ...], AudioError | None]  # the clips up to the first that cannot be read
Row = dict[str, Any]
"""What is written of a question: `index`, `id`, `uri`, `prompt`, and `answer` with its counts, or `error`."""


@dataclass(frozen=True)
class Question:
    """A question about a stretch of audio or several, by its place among others; `history` is what was said before."""

    index: int
    id: str
    stretch: Stretch
    prompt: str
    more_audio: tuple[Stretch, ...] = ()
    history: tuple[Message, ...] = ()

    @classmethod
    def of(cls, index: int, sample: Sample) -> Question:
        """The last question of a sample, after its history, about all its recordings."""
        *history, asked, _ = messages_of(sample)
        return cls(index, sample.id, sample.stretch, asked.text, sample.more_audio, tuple(history))

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """All recordings, in order."""
        return (self.stretch, *self.more_audio)

    @property
    def clip_key(self) -> str:
        """All that is heard, in one word; of one stretch the key under which the engine keeps it."""
        keys = [_key(stretch) for stretch in self.stretches]
        return keys[0] if len(keys) == 1 else hashlib.sha256(" ".join(keys).encode()).hexdigest()

    def num_windows(self, max_windows: int) -> int:
        """Windows of all recordings, of each `max_windows` at most."""
        return sum(stretch.num_windows(max_windows) for stretch in self.stretches)


def _key(stretch: Stretch) -> str:
    """A stretch, as the engine keeps it."""
    return hashlib.sha256(f"{stretch.uri}@{stretch.offset_s}+{stretch.duration_s}".encode()).hexdigest()


@dataclass(frozen=True)
class AnswerLimits:
    """Limits of a question and its answer.

    Attributes:
        max_windows: 10 s windows heard of a clip at most; the rest is not read.
        max_new_tokens: tokens of an answer at most.
        allow_silent: whether a silent clip is asked about.
    """

    max_windows: int
    max_new_tokens: int
    allow_silent: bool = True


@dataclass(frozen=True)
class Result:
    """The answer to a question, or why there is none.

    Attributes:
        reason: short and stable; `refused` where the engine does not take the question, `failed` where the model could
            not answer it; else a reason of `audio.decode.AudioError` or `samples.check_samples`.
        detail: explanation, for reading.
        recording: place, among the question's, of the recording that cannot be read.
    """

    question: Question
    answer: str | None = None
    completion_tokens: int = 0
    finish_reason: str = ""
    reason: str = ""
    detail: str = ""
    recording: int = 0

    def to_row(self) -> Row:
        """The result as it is written."""
        question = self.question
        row = {"index": question.index, "id": question.id, "uri": question.stretch.uri, "prompt": question.prompt}
        if self.answer is None:
            is_of_engine = self.reason in (REFUSED, FAILED)
            return row | {"error": self.detail if is_of_engine else f"{self.reason}: {self.detail}".rstrip(": ")}
        counts = {"completion_tokens": self.completion_tokens, "finish_reason": self.finish_reason}
        return row | {"answer": self.answer} | counts


def questions_of(
    samples: Sequence[Sample], question: str | None = None, unread: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[Question], list[Result]]:
    """The last questions of samples (or one for all, without their history), and results of those that cannot be asked.

    An answer is not needed: the samples of a manifest to be labelled have none. `unread` is as in `check_samples`.
    """
    indexed = [replace(sample, answer="to come") for sample in samples]
    if question:
        indexed = [replace(sample, prompt=question, history=()) for sample in indexed]
    reasons = {id(sample): reason for sample, reason in check_samples(indexed, unread)[1]}
    questions, refused = [], []
    for index, sample in enumerate(indexed):
        if reason := reasons.get(id(sample)):
            refused.append(Result(Question(index, sample.id, sample.stretch, sample.prompt), reason=reason))
        else:
            questions.append(Question.of(index, sample))
    return questions, refused


def plan_chunks(questions: Sequence[Question], size: int, max_windows: int) -> list[list[Question]]:
    """Chunks of about `size` questions, longest clips first; questions about one clip stay together."""
    clips: dict[tuple[int, str], list[Question]] = {}
    for one in questions:
        clips.setdefault((-one.num_windows(max_windows), one.clip_key), []).append(one)
    chunks: list[list[Question]] = [[]]
    for key in sorted(clips):
        if len(chunks[-1]) >= size:
            chunks.append([])
        chunks[-1] += clips[key]
    return [chunk for chunk in chunks if chunk]


def offline(settings: Serve, limits: AnswerLimits) -> Serve:
    """The settings of an engine that answers manifests: no answer is cut by the server's own limits."""
    return settings.model_copy(
        update={
            "max_new_tokens": max(limits.max_new_tokens, settings.max_new_tokens),
            "request_timeout_s": _OFFLINE_TIMEOUT_S,
        }
    )


# --- Answering -----------------------------------------------------------------------------------------------------


def answer_all(
    engine: Engine, questions: Sequence[Question], limits: AnswerLimits, *, num_threads: int = 2
) -> list[Result]:
    """Greedy answers, in the order of `questions`; a clip is encoded once, and decoded once for all about it alone."""
    results: dict[int, Result] = {}
    heard = {one.clip_key: one.stretches for one in questions}

    def listen(place: int, event: Event) -> None:
        one = questions[place]
        if isinstance(event, Answer):
            results[place] = Result(one, event.text, event.completion_tokens, event.finish_reason)
        elif isinstance(event, RequestFailure):
            results[place] = Result(one, reason=REFUSED if event.by_caller else FAILED, detail=event.message)

    places: dict[str, list[int]] = {}
    for place, one in enumerate(questions):
        places.setdefault(one.clip_key, []).append(place)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        coming = _ahead(
            pool, ((key, partial(_read_all, stretches, limits)) for key, stretches in heard.items()), _AHEAD
        )
        done = False
        while not done or engine.num_waiting or engine.num_running:
            while not done and engine.num_waiting < engine.settings.num_slots:
                found = next(coming, None)
                if found is None:
                    done = True
                    break
                key, (clips, error) = found
                for place in places[key]:
                    one = questions[place]
                    if error is not None:
                        results[place] = Result(one, reason=error.reason, detail=error.detail, recording=len(clips))
                    else:
                        most = limits.max_new_tokens
                        request = Request(one.prompt, clips, history=one.history, max_new_tokens=most, id=one.id)
                        engine.submit(request, partial(listen, place))
            engine.step()
    return [results[place] for place in range(len(questions))]


def _read_all(stretches: Sequence[Stretch], limits: AnswerLimits) -> _Decoded:
    """The clips of stretches, and what is wrong with the first that cannot be read."""
    clips: list[Clip] = []
    for stretch in stretches:
        found = _read(_key(stretch), stretch, limits)
        if isinstance(found, AudioError):
            return tuple(clips), found
        clips.append(found)
    return tuple(clips), None


def _read(key: str, stretch: Stretch, limits: AnswerLimits) -> Clip | AudioError:
    try:
        windows = hear(stretch, limits.max_windows, allow_silent=limits.allow_silent)
    except AudioError as error:
        return error
    return Clip.of(windows, key, stretch.first(limits.max_windows).duration_s)


def _ahead(
    pool: ThreadPoolExecutor, calls: Iterable[tuple[str, Callable[[], _Decoded]]], num: int
) -> Iterator[tuple[str, _Decoded]]:
    """Results of `calls` in order, at most `num` of them being made or waiting."""
    running: list[tuple[str, Future[_Decoded]]] = []
    for key, call in calls:
        running.append((key, pool.submit(call)))
        if len(running) >= num:
            first, future = running.pop(0)
            yield first, future.result()
    for key, future in running:
        yield key, future.result()


class Answerer:
    """One actor: an engine that answers the chunks it is given."""

    def __init__(self, model: str, settings: Mapping[str, Any], limits: AnswerLimits, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._limits = limits
        self._engine = Engine.from_pretrained(model, own_device(), Serve(**settings), max_windows=limits.max_windows)

    def __call__(self, row: Mapping[str, Any]) -> Row:
        """Answer the chunk of a row: `chunk` (its number) and `questions` (JSON), to `chunk` and `results` (JSON)."""
        questions = [_question(facts) for facts in json.loads(row["questions"])]
        results = answer_all(self._engine, questions, self._limits)
        facts = [{key: value for key, value in asdict(result).items() if key != "question"} for result in results]
        return {"chunk": row["chunk"], "results": json.dumps(facts)}


def _question(facts: Mapping[str, Any]) -> Question:
    """Inverse of `dataclasses.asdict`."""
    more_audio = tuple(Stretch(**stretch) for stretch in facts["more_audio"])
    history = tuple(Message(**message) for message in facts["history"])
    stretch = Stretch(**facts["stretch"])
    return Question(**{**facts, "stretch": stretch, "more_audio": more_audio, "history": history})


def answer_on_ray(
    model: str, chunks: Mapping[int, Sequence[Question]], settings: Serve, limits: AnswerLimits, actors: Actors
) -> Iterator[tuple[int, list[Result]]]:
    """Answer chunks on the Ray cluster that is connected: a chunk's number and results, as each is done."""
    items = [
        {"chunk": number, "questions": json.dumps([asdict(one) for one in chunk])} for number, chunk in chunks.items()
    ]
    args = (model, offline(settings, limits).model_dump(), limits, actors.threads)
    for row in map_on_ray(items, Answerer, args, actors):
        number = int(row["chunk"])
        facts = json.loads(row["results"])
        yield number, [Result(one, **fact) for one, fact in zip(chunks[number], facts, strict=True)]


def server_actors(settings: Serve, num: int) -> Actors:
    """Actors that take CPUs and GPUs as a replica of the server does (`auto`: one CPU, a GPU where there is any)."""
    cpus = 1.0 if settings.cpus_per_replica == "auto" else settings.cpus_per_replica
    gpus = Actors.gpus_there() if settings.gpus_per_replica == "auto" else float(settings.gpus_per_replica)
    return Actors(num, cpus, gpus, max(1, int(cpus)))


# --- Files ---------------------------------------------------------------------------------------------------------


def part_uri(folder: str, number: int) -> str:
    """The address of a chunk's rows."""
    return f"{folder}/chunk-{number:07d}.jsonl"


def model_facts(model: str) -> dict[str, Any]:
    """The version of an export, which tells it from another one at the same address, and its `max_windows`.

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
    if TEMPLATE_FILE in files:
        template = known_template(fs.cat_file(f"{path}/{TEMPLATE_FILE}").decode())
        version += [] if template == CHAT_TEMPLATE else [(TEMPLATE_FILE, template)]
    mark = hashlib.sha256(json.dumps(version).encode()).hexdigest()[:16]
    return {"version": mark, "max_windows": json.loads(fs.cat_file(f"{path}/config.json")).get("max_windows")}


def parts_there(folder: str) -> set[int]:
    """Numbers of the chunks that are done."""
    fs, path = locate(folder)
    fs.invalidate_cache()
    if not fs.exists(path):
        return set()
    names = [str(file).rsplit("/", 1)[-1] for file in fs.ls(path, detail=False)]
    return {int(name[6:13]) for name in names if name.startswith("chunk-") and name.endswith(".jsonl")}


def write_rows(uri: str, rows: Iterable[Row]) -> None:
    """JSON lines, whole or not at all."""
    write_text(uri, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def join(folder: str, num_chunks: int, refused: Iterable[Row], out: str) -> tuple[int, int]:
    """Write all rows in input order to `out` (`.jsonl` or `.parquet`); how many, and how many have an answer.

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
