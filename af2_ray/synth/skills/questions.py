"""Questions about clips in counterbalanced pairs (the same words over two clips, with different answers), and drills.

A pair is built from two clips of one block. Skills that ask for the exchanged relation (order, counting, attribute,
grounding) pair two mirrored clips; identification pairs clips of the two families, which have different sounds. The
options are shuffled once for a pair, so neither the words nor the length of a clip says which answer is right. A new
skill is a file of this folder and a line of `SKILLS`.
"""

from __future__ import annotations

from collections.abc import Sequence

from af2_ray.data.samples import list_options
from af2_ray.synth.facts import SOUND, Facts
from af2_ray.synth.skills import attribute, counting, grounding, identification, order
from af2_ray.synth.skills.question import Ask, Pair, Question, Rng, Skill

# Drills are drawn in this order: another one would change the bytes of a corpus, a line at the end does not.
SKILLS: dict[str, Skill] = {
    "identification": identification.SKILL,
    "order": order.SKILL,
    "grounding": grounding.SKILL,
    "counting": counting.SKILL,
    "attribute": attribute.SKILL,
}
IDENTIFICATION_SHARE = 0.35
REQUESTS = ("Describe the sounds.", "What happens in this clip?", "Write a caption for this clip.")


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
            ask = identification.identify(Pair(block[first], block[second], pool, ()), rng)
            out += _paired("identification", ask, block, (first, second), len(out), rng)
    for first, second in ((0, 1), (2, 3)):
        absent = [label for label in pool if label not in block[first].labels]
        wrong = tuple(str(label) for label in rng.choice(absent, 2, replace=False))
        name = next(name for name, skill in SKILLS.items() if skill.kind == block[first].kind)
        asks = SKILLS[name].asks(Pair(block[first], block[second], pool, wrong), rng)
        shuffled = [asks[i] for i in rng.permutation(len(asks))]
        for number in range(per_clip - num_identify):
            out += _paired(name, shuffled[number % len(asks)], block, (first, second), len(out), rng)
    return out + [
        Question(index, REQUESTS[int(rng.integers(len(REQUESTS)))], "", "caption", "caption")
        for index in range(len(block))
        for _ in range(captions_per_clip)
    ]


def _paired(
    skill: str, ask: Ask, block: Sequence[Facts], clips: tuple[int, int], number: int, rng: Rng
) -> list[Question]:
    options = tuple(str(option) for option in rng.permutation(ask.options)) if ask.options else ()
    prompt = ask.text if ask.template.endswith("-open") else ask.text + list_options(options)
    return [Question(i, prompt, ask.answer(block[i]), skill, ask.template, options, str(number)) for i in clips]


def make_drills(index: int, facts: Facts, rng: Rng) -> list[Question]:
    """Short open questions about everything that is known of a clip, for training alone; none where one sound fills it.

    A question of `make_questions` asks for one relation among four listed sounds, in one of two opposite forms (first
    or last, louder or softer). To a small model that is one bit in thirty tokens, and of opposite sign in every other
    question: the fusion of `tiny` stayed at a coin's accuracy on order for whole runs of it. Drills ask about all pairs
    and all sounds of the same clip in a dozen tokens each, so the relation is learned first, and its forms and listings
    afterwards.

    Args:
        index: number of the clip in its block, `Question.scene` of each drill.
        facts: truth that they ask for.
        rng: source of the words, and of which of two forms is asked.
    """
    if facts.kind == SOUND:
        return []
    return [
        Question(index, text, answer, name, f"{name}-drill")
        for name, skill in SKILLS.items()
        if skill.drills
        for text, answer in skill.drills(facts, rng)
    ]
