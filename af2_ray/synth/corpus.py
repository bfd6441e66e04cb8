"""A corpus from one recipe block: source clips, scenes, audio, manifests, caption sets.

Everything follows from the block and its seed: the same block gives the same bytes whatever the number of processes
(each block of four scenes has a random stream of its own). What is finished is not made again: a set is marked with the
fingerprint of what it was made from, so a cut run goes on and a changed recipe makes only what it changed.

    DIR/sources.csv                     every source clip: package, file, licence, split, measures, group
    DIR/SET/SPLIT/00001.flac            16 kHz mono
    DIR/SET/SPLIT.json                  questions, NVIDIA's manifest
    DIR/SET/SPLIT.captions.jsonl        caption sets of AF-CLAP
    DIR/SET/SPLIT.reading.jsonl         the same questions about the scenes in words, for the LM
    DIR/SET/SPLIT.scenes.jsonl          the truth
    DIR/SET/train.drills.json           short questions about all that is known of a training scene, and
    DIR/SET/train.drills.reading.jsonl  the same about the scenes in words
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from af2_ray.audio.windows import SAMPLE_RATE
from af2_ray.config import Corpus, SceneSet
from af2_ray.machine import usable_cpus
from af2_ray.storage.files import read_json, write_whole
from af2_ray.storage.places import is_remote, locate
from af2_ray.storage.stores import locked, retried, scratch, send
from af2_ray.synth.captions.by_grammar import make_captions
from af2_ray.synth.rows import Row, SetRows, mark_gallery, reading_row, truth_row
from af2_ray.synth.scenes import compose_block, facts_of, render_scene
from af2_ray.synth.skills.drills import make_drills
from af2_ray.synth.skills.questions import make_questions
from af2_ray.synth.sounds import collect, packages
from af2_ray.synth.sounds.bank import Bank, Bed, write_bank
from af2_ray.synth.sounds.catalogue import BEDS, CLASSES
from af2_ray.synth.sounds.curate import Clip, grouped, split_clips

log = logging.getLogger(__name__)

VERSION = 10  # raise it when the same recipe would give other bytes
BLOCK = 4  # scenes
Progress = Callable[[int, int, str], None]  # (done, total, what)


@dataclass(frozen=True)
class CorpusReport:
    """What was made: the folder, its source clips and classes, hours of scenes, one digest over all of it."""

    dir: str
    num_source_clips: int
    num_classes: int
    hours: float
    sha256: str


def make_corpus(corpus: Corpus, *, progress: Progress | None = None, num_processes: int | None = None) -> CorpusReport:
    """Make what is not there yet and report on the whole.

    Args:
        corpus: the recipe's block; a `dir` in object storage is sent there when all of it has been made here.
        progress: function that is called with (scenes done, scenes in all, what is being made).
        num_processes: number of processes that render; default: the CPUs of this process.

    Raises:
        ValueError: the sources give too few classes, or a setting cannot be met; the message names the fix.
    """
    if not is_remote(corpus.dir):
        folder = Path(corpus.dir)
        if found := _made_before(corpus, folder, progress):
            return found
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".{folder.name}.lock")
        with locked(lock):  # of two jobs that need it, one makes it and the other waits
            return _made_before(corpus, folder, progress) or _make_all(corpus, folder, progress, num_processes)
    name = _digest([corpus.dir, _fingerprint(corpus)])[:16]
    with locked(scratch("corpora") / f".{name}.lock"):
        return _make_remote(corpus, scratch("corpora") / name, progress, num_processes)


def _make_remote(corpus: Corpus, folder: Path, progress: Progress | None, num_processes: int | None) -> CorpusReport:
    """Make a corpus in a scratch folder and send it; one that was cut short goes on there."""
    fs, root = locate(corpus.dir.rstrip("/"))
    fs.invalidate_cache()
    report = f"{root}/corpus.json"
    if retried(lambda: fs.exists(report)):
        known = json.loads(retried(lambda: fs.cat_file(report)))
        if known["fingerprint"] == _fingerprint(corpus):
            return CorpusReport(**known["report"])
        retried(lambda: fs.rm(report))  # from here on the store has no whole corpus until all of it is sent
    made = _make_all(corpus, folder, progress, num_processes)
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    send([str(name) for name in names if name.parts[0] != "packages"], folder, corpus.dir)
    shutil.rmtree(folder)
    return made


def _made_before(corpus: Corpus, folder: Path, progress: Progress | None) -> CorpusReport | None:
    """The report of a corpus that is there as these settings have it."""
    path = folder / "corpus.json"
    known = read_json(path)
    if known is None or known["fingerprint"] != _fingerprint(corpus):
        return None
    if progress:
        progress(num_scenes(corpus), num_scenes(corpus), "made before")
    return CorpusReport(**known["report"])


def num_scenes(corpus: Corpus) -> int:
    """Scenes that will be made: each set rounded up to whole blocks."""
    return sum(_num_blocks(scenes) * BLOCK for scenes in corpus.sets)


def _make_all(corpus: Corpus, folder: Path, progress: Progress | None, num_processes: int | None) -> CorpusReport:
    show = progress or (lambda done, total, what: None)
    total = num_scenes(corpus)
    show(0, total, "source clips")
    facts = _make_sources(corpus, folder)
    done, hours, digests = 0, 0.0, [facts["sha256"]]
    for scenes in corpus.sets:
        what = f"{scenes.name}/{scenes.split}"

        def advance(number: int, at: int = done, what: str = what) -> None:
            show(at + number, total, what)

        made = _make_set(corpus, scenes, folder, facts["sha256"], advance, num_processes)
        done += _num_blocks(scenes) * BLOCK
        hours += made["hours"]
        digests.append(made["sha256"])
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    report = CorpusReport(corpus.dir, facts["num_clips"], len(facts["classes"]), round(hours, 3), digest)
    _write_json(folder / "corpus.json", {"fingerprint": _fingerprint(corpus), "report": asdict(report)})
    show(total, total, "done")
    return report


def _fingerprint(corpus: Corpus, *more: Any, without: frozenset[str] = frozenset()) -> str:
    """Digest of the settings that decide the bytes of the whole, of one set, or of the source clips."""
    kept = corpus.model_dump(mode="json", exclude={"dir", *without})
    return _digest([VERSION, repr(CLASSES), repr(BEDS), kept, *more, *collect.state(corpus.sources)])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")


# --- Source clips ------------------------------------------------------------------------------------------------


def _make_sources(corpus: Corpus, folder: Path) -> Row:
    """Collect, curate, split and store the source clips; returns what `sources/done.json` keeps."""
    store = folder / "sources"
    fingerprint = _fingerprint(corpus, without=frozenset({"sets", "num_positives", "num_negatives"}))
    done = store / "done.json"
    if (known := read_json(done)) and known["fingerprint"] == fingerprint:
        return known
    store.mkdir(parents=True, exist_ok=True)
    clips, beds = _collect(corpus, folder)
    clips = split_clips(grouped(clips), corpus.num_classes, corpus.min_clips, corpus.seed)
    labels = list(dict.fromkeys(clip.label for clip in clips))
    known_classes = {c.label: c for c in CLASSES}
    phrases = {
        label: list(known_classes[label].phrases) if label in known_classes else _phrases(label) for label in labels
    }
    musical = {label: label in known_classes and known_classes[label].musical for label in labels}
    write_bank(store, clips, beds, phrases, musical, corpus.seed)
    collect.write_table(clips, beds, folder / "sources.csv")
    facts = {
        "fingerprint": fingerprint,
        "num_clips": len(clips),
        "classes": {label: _per_split(clips, label) for label in labels},
        "sha256": hashlib.sha256((store / "bank.npy").read_bytes() + (store / "bank.json").read_bytes()).hexdigest(),
    }
    _write_json(done, facts)
    return facts


def _collect(corpus: Corpus, folder: Path) -> tuple[list[Clip], list[Bed]]:
    """All clips there are, before curation, and all beds."""
    beds = collect.rendered_beds(corpus.seed)
    if corpus.sources == "packages":
        cache = folder / "packages"
        folders = packages.fetch(cache)
        programs = packages.install_programs(cache) if folders else ()
        clips = collect.recorded(folders)
        if "fluidsynth" in programs:
            clips += collect.soundfont_clips(folders, corpus.seed)
        if "espeak-ng" in programs:
            clips += collect.spoken()
        beds += collect.recorded_beds(folders, corpus.seed)
        shutil.rmtree(cache / "unpacked", ignore_errors=True)  # the archives stay
        if clips:
            order = {c.label: index for index, c in enumerate(CLASSES)}
            return sorted(clips, key=lambda c: order[c.label]), beds
        log.warning("no package could be had: the corpus is made of sounds rendered here")
    elif corpus.sources != "rendered":
        return collect.from_folder(Path(corpus.sources)), beds + collect.rendered_beds(
            corpus.seed, ("ambience", "music")
        )
    return collect.self_rendered(corpus.seed), beds + collect.rendered_beds(corpus.seed, ("ambience", "music"))


def _phrases(label: str) -> list[str]:
    article = "an" if label[0] in "aeiou" else "a"
    return [f"{article} {label}", f"a {label} sound"]


def _per_split(clips: list[Clip], label: str) -> dict[str, int]:
    return {split: sum(c.label == label and c.split == split for c in clips) for split in ("train", "val", "test")}


# --- Scenes ------------------------------------------------------------------------------------------------------


def _num_blocks(scenes: SceneSet) -> int:
    """Scenes come in blocks of four, so their number is rounded up."""
    return -(-scenes.num_scenes // BLOCK)


def _make_set(
    corpus: Corpus,
    scenes: SceneSet,
    folder: Path,
    source_digest: str,
    advance: Callable[[int], None],
    num_processes: int | None,
) -> Row:
    """Render one scene set and write its manifests."""
    base = folder / scenes.name
    done = base / f"{scenes.split}.done.json"
    fingerprint = _fingerprint(corpus, scenes.model_dump(mode="json"), source_digest, without=frozenset({"sets"}))
    if (known := read_json(done)) and known["fingerprint"] == fingerprint:
        return known
    done.unlink(missing_ok=True)
    shutil.rmtree(base / scenes.split, ignore_errors=True)
    (base / scenes.split).mkdir(parents=True)
    rows = SetRows()
    for number, block in enumerate(_blocks(corpus, scenes, folder, num_processes)):
        rows.add(block)
        advance((number + 1) * BLOCK)
    mark_gallery(rows.truth)
    _write_lines(base / f"{scenes.split}.scenes.jsonl", rows.truth)
    _write_lines(base / f"{scenes.split}.captions.jsonl", rows.captions)
    _write_lines(base / f"{scenes.split}.reading.jsonl", rows.readings)
    _write_manifest(base / f"{scenes.split}.json", scenes, rows.questions)
    names = ["json", "captions.jsonl", "reading.jsonl", "scenes.jsonl"]
    if rows.drills:
        _write_manifest(base / f"{scenes.split}.drills.json", scenes, rows.drills)
        _write_lines(base / f"{scenes.split}.drills.reading.jsonl", rows.drill_readings)
        names += ["drills.json", "drills.reading.jsonl"]
    digest = hashlib.sha256()
    for name in names:
        digest.update((base / f"{scenes.split}.{name}").read_bytes())
    facts = {
        "fingerprint": fingerprint,
        "num_scenes": len(rows.truth),
        "hours": sum(row["duration"] for row in rows.truth) / 3600,
        "sha256": digest.hexdigest(),
    }
    _write_json(done, facts)
    return facts


def _write_manifest(path: Path, scenes: SceneSet, questions: Sequence[Row]) -> None:
    """NVIDIA's JSON (docs/paper.md, "Data")."""
    manifest = {
        "split": scenes.split,
        "split_path": scenes.split,
        "flamingo_task": f"{scenes.name}-AQA",
        "total_num": len(questions),
        "data": {str(index): question for index, question in enumerate(questions)},
    }
    _write_json(path, manifest)


def _blocks(corpus: Corpus, scenes: SceneSet, folder: Path, num_processes: int | None) -> Iterator[SetRows]:
    """Blocks in order, made by several processes."""
    jobs = [(index, corpus, scenes, str(folder)) for index in range(_num_blocks(scenes))]
    num = min(num_processes or usable_cpus(), len(jobs))
    if num <= 1:
        _open_bank(folder / "sources")
        yield from map(_make_block, jobs)
        return
    # fork: the workers need numpy and soundfile only, and do not import the caller's script (torch, ray) again
    pool = ProcessPoolExecutor(num, multiprocessing.get_context("fork"), _start_worker, (folder / "sources",))
    with pool:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until a worker has put the handler back
        try:
            made = pool.map(_make_block, jobs, chunksize=max(1, min(16, len(jobs) // (4 * num))))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            yield from made
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a process that makes scenes of {scenes.name}/{scenes.split} was killed: too little memory for {num} "
                "of them, most likely; the same command goes on"
            ) from error


_bank: Bank  # of this process


def _start_worker(folder: Path) -> None:
    """SIGTERM ends a worker, whatever handler it has inherited from a job (`console.main`)."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _open_bank(folder)


def _open_bank(folder: Path) -> None:
    global _bank
    _bank = Bank(folder)


def _make_block(job: tuple[int, Corpus, SceneSet, str]) -> SetRows:
    """Compose, render and describe one block."""
    index, corpus, scenes, folder = job
    bank, rows = _bank, SetRows()
    block = compose_block(scenes, bank, index, corpus.seed)
    facts = [facts_of(scene) for scene in block]
    rng = np.random.default_rng([corpus.seed, *f"{scenes.name}/{scenes.split}".encode(), index, 1])
    pool = [label for label in bank.labels if not (block[0].bed_kind == "music" and bank.musical[label])]
    for number, (scene, known) in enumerate(zip(block, facts, strict=True)):
        name = f"{index * BLOCK + number + 1:05d}.flac"
        audio = render_scene(scene, bank)
        soundfile.write(Path(folder, scenes.name, scenes.split, name), audio, SAMPLE_RATE, "PCM_16", format="FLAC")
        made = make_captions(known, bank.phrases, pool, corpus.num_positives, corpus.num_negatives, rng)
        rows.captions.append(
            {
                "name": f"{scenes.split}/{name}",
                "duration": scene.duration_s,
                "caption": made.caption,
                "positives": made.paraphrases,
                "negatives": made.negatives,
                "relations": [scene.kind],
            }
        )
        rows.truth.append(truth_row(scene, name, hashlib.sha256(audio.tobytes()).hexdigest()))
    asked = make_questions(facts, scenes.questions_per_scene, scenes.captions_per_scene, pool, rng)
    rows.questions = [rows.question(each, scenes, block[each.scene]) for each in asked]
    rows.readings = [reading_row(row, facts[each.scene]) for row, each in zip(rows.questions, asked, strict=True)]
    if scenes.split == "train":
        drills = [drill for number, known in enumerate(facts) for drill in make_drills(number, known, rng)]
        rows.drills = [rows.question(each, scenes, block[each.scene]) for each in drills]
        pairs = zip(rows.drills, drills, strict=True)
        rows.drill_readings = [reading_row(row, facts[each.scene]) for row, each in pairs]
    return rows


def _write_lines(path: Path, rows: list[Row]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
