"""The data of a fine-tuning: read, checked, parted by recording, and written down as it is used.

Whatever format it came in, what is trained and tested on lies in the run as JSON lines (`<run>/data/*.jsonl`): absolute
names, durations, only what can be used. The price is a copy of the texts; in return the split can be looked at, and the
same files serve `jobs/evaluate.py` afterwards.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from af2_ray.audio.windows import WINDOW_S
from af2_ray.config import Dataset
from af2_ray.data.data_check import contents_of, longer_than, same_recordings, shorten
from af2_ray.data.durations import fill_durations
from af2_ray.data.label_folders import asked_again
from af2_ray.data.manifest import kind_of, read_samples
from af2_ray.data.manifest_rows import write_samples
from af2_ray.data.packing import Index
from af2_ray.data.samples import Sample, check_samples
from af2_ray.storage.places import shown

FEWEST_SAMPLES = 20
HELD_OUT = 0.1  # share of the recordings that is held out where no validation is given
FEWEST_HELD_OUT = 8  # recordings, as far as they are no more than a quarter
MOST_HELD_OUT = 200  # recordings
TIMES = 4  # questions about a training clip of a folder of labels
MOST_OLD = 240  # questions of held-out replay that are asked before and after


@dataclass(frozen=True)
class Sources:
    """Manifests or folders as they were given; only `train` is needed."""

    train: Sequence[Dataset]
    validation: Sequence[Dataset] = ()
    test: Sequence[Dataset] = ()
    replay: Sequence[Dataset] = ()
    old_test: Sequence[Dataset] = ()


@dataclass(frozen=True)
class Parts:
    """What is used, part by part.

    Attributes:
        train, validation, test, replay, old_test: usable samples of each; `replay` and `old_test` may be empty.
        set_aside: numbers of samples that cannot be used, by part and reason.
        remarks: sentences on what was decided for want of something.
        num_cut: recordings that are longer than the model will hear, of all parts.
    """

    train: Sequence[Sample]
    validation: Sequence[Sample]
    test: Sequence[Sample]
    replay: Sequence[Sample] = ()
    old_test: Sequence[Sample] = ()
    set_aside: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    num_cut: int = 0

    def named(self) -> dict[str, Sequence[Sample]]:
        """The parts that hold something, by name."""
        parts = {name: getattr(self, name) for name in ("train", "validation", "test", "replay", "old_test")}
        return {name: samples for name, samples in parts.items() if len(samples)}

    def counts(self) -> list[dict[str, object]]:
        """A row a part: its samples, recordings, minutes, and what was set aside of it."""
        rows: list[dict[str, object]] = []
        for name, samples in self.named().items():
            stretches = {stretch for sample in samples for stretch in sample.stretches}
            minutes = sum(stretch.duration_s for stretch in stretches) / 60
            rows.append(
                {
                    "part": name.replace("_", " "),
                    "samples": len(samples),
                    "recordings": len({stretch.uri for stretch in stretches}),
                    "minutes": round(minutes, 1),
                    "set_aside": dict(self.set_aside.get(name, {})),
                }
            )
        return rows


def read_parts(sources: Sources, *, seed: int = 0) -> Parts:
    """Read all sources, and hold recordings out where no validation is given.

    Without a test the validation questions are asked before and after; without an old test, a held-out part of what
    is replayed.

    Raises:
        ValueError: a source cannot be read, holds no usable sample, `train` holds fewer than 20, or a recording is in
            two of train, validation and test.
    """
    aside: dict[str, Counter[str]] = {}
    read = {name: _usable(name, datasets, aside) for name, datasets in vars(sources).items()}
    remarks = []
    if len(read["train"]) < FEWEST_SAMPLES:
        raise ValueError(
            f"{_names(sources.train)}: {len(read['train'])} usable samples, and at least {FEWEST_SAMPLES} are needed "
            f"to learn anything{_reasons(aside.get('train'))}; add recordings or questions"
        )
    _check_apart(read)
    if not read["validation"]:
        read["train"], read["validation"] = hold_out(read["train"], seed=seed)
        num = len({sample.uri for sample in read["validation"]})
        remarks.append(f"no --validation: {num} recordings with all their questions are held out for it")
    if not read["test"]:
        read["test"] = read["validation"]
        remarks.append("no --test: scores are of the validation questions, which also choose the checkpoint")
    if read["replay"] and not read["old_test"]:
        read["replay"], held = hold_out(read["replay"], seed=seed)
        read["old_test"] = held[:MOST_OLD]
        remarks.append(f"no --old-test: {len(read['old_test'])} questions of held-out replay show what is forgotten")
    if all(kind_of(dataset.manifest) == "labels" for dataset in sources.train):
        read["train"] = asked_again(read["train"], TIMES)
        remarks.append(f"a folder of labels: each training clip is asked {TIMES} times, among other options")
    return Parts(
        train=read["train"],
        validation=read["validation"],
        test=read["test"],
        replay=read["replay"],
        old_test=read["old_test"],
        set_aside=aside,
        remarks=tuple(remarks),
    )


def hold_out(samples: Sequence[Sample], share: float = HELD_OUT, *, seed: int = 0) -> tuple[list[Sample], list[Sample]]:
    """Part samples by recording: those that stay, and those of a random `share` of the recordings (at least one).

    Samples that share any recording stay together, and so do those of equal files under several names.

    Raises:
        ValueError: all samples hang together, so nothing can be held out.
    """
    groups = _groups(samples)
    order = sorted(set(groups.values()), key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    if len(order) < 2:
        raise ValueError(
            f"all {len(samples)} samples are of one recording ({shown(samples[0].uri)}), so none can be held out: give "
            "--validation with other recordings"
        )
    fewest = max(1, min(FEWEST_HELD_OUT, len(order) // 4))
    held = set(order[: min(MOST_HELD_OUT, max(fewest, round(share * len(order))))])
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        parts[groups[sample.uri] in held].append(sample)
    return parts


def check_lengths(parts: Parts, tokens_of: Mapping[str, Index], *, max_tokens: int) -> None:
    """`ValueError` for training text that would be cut: the samples, their tokens, and the key to raise.

    Args:
        tokens_of: tokens of each sample with its answer, by part, [N] each.
        max_tokens: the longest that is learned whole (`model.max_text_tokens`).
    """
    for name, counts in tokens_of.items():
        samples = getattr(parts, name)
        long = [f"{samples[i].id} ({counts[i]})" for i in np.flatnonzero(counts > max_tokens).tolist()]
        if long:
            raise ValueError(
                f"{name}: {len(long)} samples have more than {max_tokens} tokens with their answer: "
                f"{', '.join(shorten([shown(each) for each in long], 5))}; shorten them, or raise model.max_text_tokens"
            )


def check_audio(parts: Parts, max_windows: int, *, cut: bool) -> Parts:
    """The parts, once their audio is known to be heard whole, or its end to be cut as was asked for.

    Raises:
        ValueError: audio longer than `max_windows` that was not to be cut; the message names it.
    """
    long = {name: longer_than(samples, max_windows) for name, samples in parts.named().items()}
    found = [f"{shown(name)} ({seconds:.0f} s)" for recordings in long.values() for name, seconds in recordings]
    if not found:
        return parts
    most = max_windows * WINDOW_S
    if not cut:
        raise ValueError(
            f"{len(found)} recordings have more than the {most} s of audio that are heard: "
            f"{', '.join(shorten(found, 5))}; cut the recordings, raise stages.finetune.max_windows, or give "
            "--cut-audio to hear their first part only"
        )
    remark = f"--cut-audio: of {len(found)} recordings only the first {most} s are heard"
    return replace(parts, num_cut=len(found), remarks=(*parts.remarks, remark))


def places_of(parts: Parts, run: str) -> dict[str, str]:
    """The address of each part's manifest in a run's directory, by name."""
    return {name: f"{run.rstrip('/')}/data/{name}.jsonl" for name in parts.named()}


def write_parts(parts: Parts, run: str) -> None:
    """Write each part's manifest to its place in the run's directory."""
    for name, place in places_of(parts, run).items():
        write_samples(place, parts.named()[name])


def _usable(name: str, datasets: Sequence[Dataset], aside: dict[str, Counter[str]]) -> list[Sample]:
    found: list[Sample] = []
    for dataset in datasets:
        samples, unread = fill_durations(
            read_samples(dataset.manifest, dataset.root, dataset.columns), dataset.manifest
        )
        good, bad = check_samples(samples, unread)
        if not good:
            raise ValueError(f"{shown(dataset.manifest)}: no usable sample{_reasons(Counter(r for _, r in bad))}")
        aside.setdefault(name, Counter()).update(reason for _, reason in bad)
        found += map(_absolute, good)
    return found


def _absolute(sample: Sample) -> Sample:
    """The sample with names that hold in every folder."""
    more = tuple(replace(stretch, uri=_whole_name(stretch.uri)) for stretch in sample.more_audio)
    return replace(sample, uri=_whole_name(sample.uri), more_audio=more)


def _whole_name(uri: str) -> str:
    return uri if "://" in uri else os.path.abspath(uri)


def _check_apart(parts: Mapping[str, Sequence[Sample]]) -> None:
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test"), ("train", "old_test")):
        if same := same_recordings(parts[one], parts[other]):
            both = f"both {one} and {other}".replace("_", " ")
            raise ValueError(
                f"{len(same)} recordings are in {both} (by what the files hold, whatever their names): "
                f"{'; '.join(shorten(same, 5))}. A score on what was trained on means nothing: take them out of one"
            )


def _groups(samples: Sequence[Sample]) -> dict[str, str]:
    """A name for each recording: that of the first one that it hangs together with."""
    content = contents_of(stretch.uri for sample in samples for stretch in sample.stretches)
    first: dict[str, str] = {}

    def root(uri: str) -> str:
        while first.setdefault(uri, uri) != uri:
            uri = first[uri]
        return uri

    for sample in samples:
        for stretch in sample.stretches:
            first[root(stretch.uri)] = root(sample.uri)
            if stretch.uri in content:
                first[root(content[stretch.uri])] = root(sample.uri)
    return {uri: root(uri) for uri in list(first)}


def _names(datasets: Sequence[Dataset]) -> str:
    return ", ".join(shown(dataset.manifest) for dataset in datasets)


def _reasons(aside: Counter[str] | None) -> str:
    found = ", ".join(f"{reason} {count}" for reason, count in (aside or {}).items())
    return f" (set aside: {found})" if found else ""
