"""What a skill gives: questions about two clips before they are paired, and drills about one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from af2_ray.synth.facts import Facts

Rng = np.random.Generator
RELATION = attrgetter("relation")  # of `Facts`, where that is the answer


@dataclass(frozen=True)
class Question:
    """One question about one clip.

    Attributes:
        scene: number of the clip in its block.
        prompt: words of the question, with its options.
        answer: right answer; "" where it is the clip's caption.
        skill: name in `questions.SKILLS`, or `caption`.
        template: kind of wording, by which answers are counted.
        options: answers to choose from; none: any class.
        pair: number that a question shares with its counterpart in the block; "" where it has none.
    """

    scene: int
    prompt: str
    answer: str
    skill: str
    template: str
    options: tuple[str, ...] = ()
    pair: str = ""


@dataclass(frozen=True)
class Ask:
    """A question before it is paired: its words, what the answer can be, the answer in each clip.

    `options` are listed after the words, (A) to (D), unless the template ends in `-open`; there they only say what the
    question leaves open (none: any class).
    """

    template: str
    text: str
    options: tuple[str, ...]
    answer: Callable[[Facts], str]


@dataclass(frozen=True)
class Pair:
    """Two clips whose facts differ in one relation, and what may be asked about them.

    Attributes:
        first, second: the clips.
        pool: classes that may be offered as wrong options.
        wrong: two classes of the pool that are in neither.
    """

    first: Facts
    second: Facts
    pool: Sequence[str]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Skill:
    """One skill: a file of this folder and a line of `questions.SKILLS`.

    Attributes:
        kind: relation of two counterparts (`Facts.kind`) that it asks about.
        asks: function that gives every way to ask for that relation.
        drills: function that gives words and answers of short open questions about one clip, whatever its kind.
    """

    kind: str
    asks: Callable[[Pair, Rng], list[Ask]]
    drills: Callable[[Facts, Rng], Iterator[tuple[str, str]]] | None = None
