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
from collections import Counter, defaultdict
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
from af2_ray.synth.captions.by_grammar import captions_of
from af2_ray.synth.rows import Row, caption_row, mark_gallery, question_row, reading_row, truth_row
from af2_ray.synth.scenes import compose_block, facts_of, render_scene
from af2_ray.synth.skills.question import Question
from af2_ray.synth.skills.questions import make_drills, make_questions
from af2_ray.synth.sounds import collect, packages
from af2_ray.synth.sounds.bank import Bank, write_bank
from af2_ray.synth.sounds.catalogue import BEDS, CLASSES, SoundClass
from af2_ray.synth.sounds.curate import SHARES, Clip, grouped, split_clips
from af2_ray.synth.text.grammar import composition_of

log = logging.getLogger(__name__)

VERSION = 10  # raise it when the same recipe would give other bytes
BLOCK = 4  # scenes
Progress = Callable[[int, int, str], None]  # (done, total, what)
Rows = dict[str, list[Row]]  # of each file of a set, by what stands after `SPLIT.` in its name


@dataclass(frozen=True)
class CorpusReport:
    """What was made: the folder, its source clips and classes, hours of scenes, one digest over all of it."""

    dir: str
    num_source_clips: int
    num_classes: int
    hours: float
    sha256: str


def make_corpus(
    corpus: Corpus, *, progress: Progress = lambda done, total, what: None, num_processes: int | None = None
) -> CorpusReport:
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
        with locked(folder.with_name(f".{folder.name}.lock")):  # of two jobs one makes it and the other waits
            return _made_before(corpus, folder, progress) or _make_all(corpus, folder, progress, num_processes)
    name = _digest([corpus.dir, _fingerprint(corpus)])[:16]
    with locked(scratch("corpora") / f".{name}.lock"):
        return _make_remote(corpus, scratch("corpora") / name, progress, num_processes)


def _make_remote(corpus: Corpus, folder: Path, progress: Progress, num_processes: int | None) -> CorpusReport:
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


def _made_before(corpus: Corpus, folder: Path, progress: Progress) -> CorpusReport | None:
    """The report of a corpus that is there as these settings have it."""
    known = read_json(folder / "corpus.json")
    if known is None or known["fingerprint"] != _fingerprint(corpus):
        return None
    progress(num_scenes(corpus), num_scenes(corpus), "made before")
    return CorpusReport(**known["report"])


def num_scenes(corpus: Corpus) -> int:
    """Scenes that will be made: each set rounded up to whole blocks."""
    return sum(_num_blocks(scenes) * BLOCK for scenes in corpus.sets)


def _make_all(corpus: Corpus, folder: Path, progress: Progress, num_processes: int | None) -> CorpusReport:
    total = num_scenes(corpus)
    progress(0, total, "source clips")
    facts = _make_sources(corpus, folder)
    done, hours, digests = 0, 0.0, [facts["sha256"]]
    for scenes in corpus.sets:

        def advance(number: int, before: int = done, what: str = f"{scenes.name}/{scenes.split}") -> None:
            progress(before + number, total, what)

        made = _make_set(corpus, scenes, folder, facts["sha256"], advance, num_processes)
        done += _num_blocks(scenes) * BLOCK
        hours += made["hours"]
        digests.append(made["sha256"])
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    report = CorpusReport(corpus.dir, facts["num_clips"], len(facts["classes"]), round(hours, 3), digest)
    write_whole(folder / "corpus.json", _json({"fingerprint": _fingerprint(corpus), "report": asdict(report)}))
    progress(total, total, "done")
    return report


def _fingerprint(corpus: Corpus, *more: Any, without: frozenset[str] = frozenset()) -> str:
    """Digest of the settings that decide the bytes of the whole, of one set, or of the source clips."""
    kept = corpus.model_dump(mode="json", exclude={"dir", *without})
    return _digest([VERSION, repr(CLASSES), repr(BEDS), kept, *more, *collect.state(corpus.sources)])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


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
    known_classes = {c.label: c for c in CLASSES}
    classes = [known_classes.get(label) or _class_of(label) for label in dict.fromkeys(clip.label for clip in clips)]
    write_bank(store, clips, beds, classes, corpus.seed)
    collect.write_table(clips, beds, folder / "sources.csv")
    nums = Counter((clip.label, clip.split) for clip in clips)
    facts = {
        "fingerprint": fingerprint,
        "num_clips": len(clips),
        "classes": {c.label: {split: nums[c.label, split] for split in SHARES} for c in classes},
        "sha256": hashlib.sha256((store / "bank.npy").read_bytes() + (store / "bank.json").read_bytes()).hexdigest(),
    }
    write_whole(done, _json(facts))
    return facts


def _class_of(label: str) -> SoundClass:
    """A class of somebody's own folder."""
    article = "an" if label[0] in "aeiou" else "a"
    return SoundClass(label, (f"{article} {label}", f"a {label} sound"), musical=False)


def _collect(corpus: Corpus, folder: Path) -> tuple[list[Clip], list[Clip]]:
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
    beds += collect.rendered_beds(corpus.seed, ("ambience", "music"))
    if corpus.sources in ("packages", "rendered"):
        return collect.self_rendered(corpus.seed), beds
    return collect.from_folder(Path(corpus.sources)), beds


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
    rows: Rows = defaultdict(list)
    for number, block in enumerate(_blocks(corpus, scenes, folder, num_processes), 1):
        for name, more in block.items():
            rows[name] += more
        advance(number * BLOCK)
    mark_gallery(rows["scenes.jsonl"])
    digest = hashlib.sha256()
    for name, found in rows.items():
        lines = (json.dumps(row) + "\n" for row in found)
        text = "".join(lines) if name.endswith(".jsonl") else _json(_manifest(scenes, found))
        write_whole(base / f"{scenes.split}.{name}", text)
        digest.update(text.encode())
    facts = {
        "fingerprint": fingerprint,
        "num_scenes": len(rows["scenes.jsonl"]),
        "hours": sum(row["duration"] for row in rows["scenes.jsonl"]) / 3600,
        "sha256": digest.hexdigest(),
    }
    write_whole(done, _json(facts))
    return facts


def _manifest(scenes: SceneSet, questions: Sequence[Row]) -> Row:
    """NVIDIA's JSON (docs/paper.md, "Data")."""
    return {
        "split": scenes.split,
        "split_path": scenes.split,
        "flamingo_task": f"{scenes.name}-AQA",
        "total_num": len(questions),
        "data": {str(index): question for index, question in enumerate(questions)},
    }


def _blocks(corpus: Corpus, scenes: SceneSet, folder: Path, num_processes: int | None) -> Iterator[Rows]:
    """Rows of the blocks in order, made by several processes."""
    global _bank
    _bank = Bank(folder / "sources")
    jobs = [(index, corpus, scenes, str(folder)) for index in range(_num_blocks(scenes))]
    num = min(num_processes or usable_cpus(), len(jobs))
    if num <= 1:
        yield from map(_make_block, jobs)
        return
    # fork: the workers need numpy and soundfile only, and do not import the caller's script (torch, ray) again
    pool = ProcessPoolExecutor(num, multiprocessing.get_context("fork"), _start_worker)
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


_bank: Bank  # of the corpus that this process makes; workers have it from their parent


def _start_worker() -> None:
    """SIGTERM ends a worker, whatever handler it has inherited from a job (`console.main`)."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _make_block(job: tuple[int, Corpus, SceneSet, str]) -> Rows:
    """Compose, render and describe one block."""
    index, corpus, scenes, folder = job
    block = compose_block(scenes, _bank, index, corpus.seed)
    facts = [facts_of(scene) for scene in block]
    rng = np.random.default_rng([corpus.seed, *f"{scenes.name}/{scenes.split}".encode(), index, 1])
    pool = _bank.askable(block[0].bed_kind)
    truth, captions = [], []
    for number, (scene, known) in enumerate(zip(block, facts, strict=True), index * BLOCK + 1):
        name = f"{number:05d}.flac"
        audio = render_scene(scene, _bank)
        soundfile.write(Path(folder, scenes.name, scenes.split, name), audio, SAMPLE_RATE, "PCM_16", format="FLAC")
        truth.append(truth_row(scene, name, hashlib.sha256(audio.tobytes()).hexdigest()))
        composition = composition_of(known)
        made = captions_of(composition, _bank.phrases, pool, corpus.num_positives, corpus.num_negatives, rng)
        captions.append(caption_row(f"{scenes.split}/{name}", scene, made))

    def asked(questions: list[Question]) -> tuple[list[Row], list[Row]]:
        """Rows of the manifest and of the readings."""
        rows = [question_row(q, scenes, block[q.scene], truth[q.scene], captions[q.scene]) for q in questions]
        return rows, [reading_row(row, facts[q.scene]) for row, q in zip(rows, questions, strict=True)]

    questions, readings = asked(make_questions(facts, scenes.questions_per_scene, scenes.captions_per_scene, pool, rng))
    rows = {"json": questions, "captions.jsonl": captions, "reading.jsonl": readings, "scenes.jsonl": truth}
    if scenes.split == "train":
        drills, readings = asked([drill for i, known in enumerate(facts) for drill in make_drills(i, known, rng)])
        if drills:
            rows |= {"drills.json": drills, "drills.reading.jsonl": readings}
    return rows
