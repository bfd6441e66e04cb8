"""Questions about clips, in counterbalanced pairs: the same words over two clips, with different answers.

A pair is built from two clips of one block. Skills that ask for the exchanged relation (order, counting, attribute,
grounding) pair two mirrored clips; identification pairs clips of the two families, which have different sounds. The
options are shuffled once for a pair, so neither the words nor the length of a clip says which answer is right.
"""

from __future__ import annotations

from collections.abc import Sequence

from af2_ray.synth.facts import Facts
from af2_ray.synth.skills.caption import describe
from af2_ray.synth.skills.identification import identify
from af2_ray.synth.skills.question import Ask, Pair, Question, Rng
from af2_ray.synth.skills.table import BY_KIND

IDENTIFICATION_SHARE = 0.35


def make_questions(
    block: Sequence[Facts], per_clip: int, captions_per_clip: int, pool: Sequence[str], rng: Rng
) -> list[Question]:
    """The questions of a block of four clips: two families of other sounds, each of two counterparts.

    Args:
        block: facts of the clips.
        per_clip: number of questions about each clip that have one right answer.
        captions_per_clip: number of requests to describe each clip.
        pool: classes that may be offered as wrong options.
        rng: source of all draws.

    Returns:
        Questions without captions' answers: a caption's answer is "" for the caller to fill in.
    """
    num_identify = min(per_clip, max(1, round(IDENTIFICATION_SHARE * per_clip)))
    out: list[Question] = []
    for number in range(num_identify):
        for first, second in ((0, 2), (1, 3)) if number % 2 == 0 else ((0, 3), (1, 2)):
            ask = identify(Pair(block[first], block[second], pool, ()), rng)
            out += _paired("identification", ask, block, (first, second), len(out), rng)
    for first, second in ((0, 1), (2, 3)):
        skill, asks = relation_asks(block[first], block[second], pool, rng)
        order = [asks[i] for i in rng.permutation(len(asks))]
        for number in range(per_clip - num_identify):
            out += _paired(skill, order[number % len(order)], block, (first, second), len(out), rng)
    return out + [describe(index, rng) for index in range(len(block)) for _ in range(captions_per_clip)]


def relation_asks(first: Facts, second: Facts, pool: Sequence[str], rng: Rng) -> tuple[str, list[Ask]]:
    """The skill that asks for the relation that two counterparts exchange, and every way to ask for it."""
    absent = [label for label in pool if label not in first.labels]
    wrong = tuple(str(label) for label in rng.choice(absent, 2, replace=False))
    name, asks = BY_KIND[first.kind]
    return name, asks(Pair(first, second, pool, wrong), rng)


def _paired(
    skill: str, ask: Ask, block: Sequence[Facts], clips: tuple[int, int], number: int, rng: Rng
) -> list[Question]:
    options = tuple(str(option) for option in rng.permutation(ask.options)) if ask.options else ()
    listed = "".join(f" ({letter}) {option}" for letter, option in zip("ABCD", options, strict=False))
    prompt = ask.text + listed if ask.listed else ask.text
    return [Question(i, prompt, ask.answer(block[i]), skill, ask.template, options, str(number)) for i in clips]
