"""A folder of `label/clip.*` to questions: which of four sounds is heard in each clip.

The words are those of composed scenes (`synth.skills.identification`), so that a model of such a corpus knows them, and
answers are scored by their option. Wrong options are drawn from the other labels by the clip's own name: they stay when
clips are added or the folder is moved. The right one has each place as often as another, for each label.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from af2_ray.data.columns import SampleTable
from af2_ray.data.names import AUDIO_SUFFIXES, Root, stem_of
from af2_ray.data.samples import Sample, list_options
from af2_ray.storage.places import locate, shown

logger = logging.getLogger(__name__)

QUESTION = "Which sound is heard?"
NUM_OPTIONS = 4


def read_label_folder(uri: str, root: str | None, num_options: int = NUM_OPTIONS) -> SampleTable:
    """A question for each clip of a folder of labels; an underscore in a label's name is a space.

    Args:
        uri: the folder, local or in a store.
        root: folder of the audio, if it is another one; the same names are below it.
        num_options: options of a question, or fewer if there are fewer labels.

    Raises:
        ValueError: fewer than two labels have clips.
    """
    clips, others = _clips(uri)
    names = {label: label.replace("_", " ").strip() for label in clips}
    if len({*names.values()}) < 2 or len({*names.values()}) < len(names):
        raise ValueError(
            f"{uri}: expected two or more folders of clips, each named as what is heard (label/clip.wav); "
            f"there are {', '.join(map(shown, sorted(clips))) or 'none'}"
        )
    base, dataset = Root.of(uri, uri if root is None else root), stem_of(uri)
    samples = []
    for label in sorted(clips):
        wrong = [names[other] for other in sorted(clips) if other != label]
        in_turn = sorted(clips[label], key=lambda name: _number(f"{label}/{name}"))
        places = {name: (_number(label) + turn) % min(num_options, len(clips)) for turn, name in enumerate(in_turn)}
        for name in sorted(clips[label]):
            draw = np.random.default_rng(_number(f"{label}/{name}"))
            options = [wrong[place] for place in draw.permutation(len(wrong))[: num_options - 1]]
            options.insert(places[name], names[label])
            samples.append(
                Sample(
                    id=f"{dataset}/{label}/{name}",
                    uri=base.join(f"{label}/{name}"),
                    offset_s=0.0,
                    duration_s=math.nan,
                    prompt=QUESTION + list_options(options),
                    answer=names[label],
                    task="AQA",
                    dataset=dataset,
                    skill="identification",
                    options=tuple(options),
                    template="identification-choice",
                )
            )
    remarks = [f"{len(others)} files are no label/clip.*, for instance {shown(others[0])}"] if others else []
    for remark in remarks:
        logger.warning("%s: %s", uri, remark)
    return SampleTable.from_samples(samples, remarks)


def asked_again(samples: Sequence[Sample], times: int, num_options: int = NUM_OPTIONS) -> list[Sample]:
    """Each question of a folder of labels `times` times in a row: as it is, then among other options in other places.

    A clip that is asked several times is encoded once, so more questions cost a training little.
    """
    labels = sorted({sample.answer for sample in samples})
    found = []
    for sample in samples:
        wrong = [label for label in labels if label != sample.answer]
        found.append(sample)
        for turn in range(1, times):
            draw = np.random.default_rng(_number(f"{sample.id} {turn}"))
            options = [wrong[place] for place in draw.permutation(len(wrong))[: num_options - 1]]
            options.insert(int(draw.integers(len(options) + 1)), sample.answer)
            again = replace(sample, id=f"{sample.id}#{turn + 1}", prompt=QUESTION + list_options(options))
            found.append(replace(again, options=tuple(options)))
    return found


def _clips(uri: str) -> tuple[dict[str, list[str]], list[str]]:
    """Names of the clips of each label, and the other files; hidden ones are neither."""
    fs, path = locate(uri.rstrip("/"))
    clips: dict[str, list[str]] = {}
    others = []
    for file in sorted(fs.find(path, maxdepth=3)):
        parts = file.removeprefix(f"{path.rstrip('/')}/").split("/")
        if any(part.startswith(".") for part in parts):
            continue
        if len(parts) == 2 and parts[1].lower().endswith(AUDIO_SUFFIXES):
            clips.setdefault(parts[0], []).append(parts[1])
        else:
            others.append("/".join(parts))
    return clips, others


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
