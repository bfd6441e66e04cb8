"""Questions about scenes, in counterbalanced pairs: the same words over two clips, with different answers.

A pair is built from two scenes of one block. Skills that ask for the exchanged relation (order, counting, attribute,
grounding) pair two mirrored scenes; identification pairs scenes of the two families, which have different sounds. The
options are shuffled once for a pair, so neither the words nor the length of a clip says which answer is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from af2_ray.synth.scenes import PARTS, SOUND, Scene

Rng = np.random.Generator
SKILLS = ("identification", "order", "counting", "attribute", "grounding", "caption")
NUMBERS = ("one", "two", "three", "four")
IDENTIFICATION_SHARE = 0.35
CAPTION_PROMPTS = ("Describe the sounds.", "What happens in this clip?", "Write a caption for this clip.")


@dataclass(frozen=True)
class Question:
    """One question about one scene. `scene` is its index in the block."""

    scene: int
    prompt: str
    answer: str
    skill: str
    template: str
    options: tuple[str, ...] = ()
    pair: str = ""


@dataclass(frozen=True)
class Ask:
    """A question before it is paired: its words, what the answer can be, the answer in each scene.

    `options` are listed after the words, (A) to (D), unless the template is an open one; there they only say what the
    question leaves open (none: any class).
    """

    skill: str
    template: str
    text: str
    options: tuple[str, ...]
    answer: Callable[[Scene], str]

    @property
    def listed(self) -> bool:
        """Whether the prompt lists the options."""
        return not self.template.endswith("-open")


def make_questions(
    block: Sequence[Scene], per_scene: int, captions_per_scene: int, pool: Sequence[str], rng: Rng
) -> list[Question]:
    """The questions of a block of four scenes.

    Args:
        per_scene: questions about each scene that have one right answer.
        captions_per_scene: requests to describe each scene.
        pool: classes that may be offered as wrong options.

    Returns:
        Questions without ids or captions' answers: a caption's answer is "" for the caller to fill in.
    """
    num_identify = min(per_scene, max(1, round(IDENTIFICATION_SHARE * per_scene)))
    out: list[Question] = []
    for number in range(num_identify):
        for first, second in ((0, 2), (1, 3)) if number % 2 == 0 else ((0, 3), (1, 2)):
            out += _paired(identify(block[first], block[second], pool, rng), block, (first, second), len(out), rng)
    for first, second in ((0, 1), (2, 3)):
        asks = relation_asks(block[first], block[second], pool, rng)
        order = [asks[i] for i in rng.permutation(len(asks))]
        for number in range(per_scene - num_identify):
            out += _paired(order[number % len(order)], block, (first, second), len(out), rng)
    for index in range(len(block)):
        for _ in range(captions_per_scene):
            prompt = CAPTION_PROMPTS[int(rng.integers(len(CAPTION_PROMPTS)))]
            out.append(Question(index, prompt, "", "caption", "caption"))
    return out


def _paired(ask: Ask, block: Sequence[Scene], scenes: tuple[int, int], number: int, rng: Rng) -> list[Question]:
    options = tuple(str(option) for option in rng.permutation(ask.options)) if ask.options else ()
    listed = "".join(f" ({letter}) {option}" for letter, option in zip("ABCD", options, strict=False))
    prompt = ask.text + listed if ask.listed else ask.text
    pair = f"{block[0].block}-{number}"
    return [Question(i, prompt, ask.answer(block[i]), ask.skill, ask.template, options, pair) for i in scenes]


# --- Identification ----------------------------------------------------------------------------------------------


def identify(first: Scene, second: Scene, pool: Sequence[str], rng: Rng) -> Ask:
    """Which of four sounds is heard: one is in the first scene, one in the second, two in neither."""
    heard = (str(rng.choice(sorted(first.labels))), str(rng.choice(sorted(second.labels))))

    def answer(scene: Scene) -> str:
        return next(label for label in heard if label in scene.labels)

    if len(first.labels) == 1 and rng.random() < 0.3:
        text = ("What sound is heard?", "What is this sound?")[int(rng.integers(2))]
        return Ask("identification", "identification-open", text, (), answer)
    absent = [label for label in pool if label not in first.labels + second.labels]
    options = heard + tuple(str(label) for label in rng.choice(absent, 2, replace=False))
    text = ("Which sound is heard?", "Which of these sounds is in the clip?")[int(rng.integers(2))]
    return Ask("identification", "identification-choice", text, options, answer)


# --- What mirrored scenes exchange -------------------------------------------------------------------------------


def relation_asks(first: Scene, second: Scene, pool: Sequence[str], rng: Rng) -> list[Ask]:
    """Every way to ask for the relation that two mirrored scenes exchange."""
    absent = [label for label in pool if label not in first.labels]
    wrong = tuple(str(label) for label in rng.choice(absent, 2, replace=False))
    if first.kind == SOUND:
        return [identify(first, second, pool, rng)]
    if first.kind == "order":
        return _order(first, wrong, rng)
    if first.kind == "count":
        return _counting(first)
    if first.kind == "position":
        return _grounding(first, second, wrong)
    return _change(first) if first.relation in ("louder", "softer") else _binding(first, wrong)


def _order(scene: Scene, wrong: tuple[str, ...], rng: Rng) -> list[Ask]:
    a, b = (scene.labels[int(i)] for i in sorted(rng.choice(len(scene.labels), 2, replace=False)))
    if rng.random() < 0.5:
        a, b = b, a
    ends = (scene.labels[0], scene.labels[-1], *wrong)

    def first(s: Scene) -> str:
        return s.labels[0]

    def last(s: Scene) -> str:
        return s.labels[-1]

    def earlier(s: Scene) -> str:
        return min((a, b), key=s.labels.index)

    asks = [
        Ask("order", "order-first", "Which sound is heard first?", ends, first),
        Ask("order", "order-begins", "What sound does the clip begin with?", ends, first),
        Ask("order", "order-last", "Which sound is heard last?", ends, last),
        Ask("order", "order-ends", "What sound does the clip end with?", ends, last),
        Ask("order", "order-first-of-two", f"Which sound comes first, the {a} or the {b}?", (a, b), earlier),
        Ask("order", "order-first-open", f"Which comes first, the {a} or the {b}?", (a, b), earlier),
    ]
    if len(scene.labels) > 2:
        before, middle, after = scene.labels[:3]  # the mirror has them the other way round

        def following(s: Scene) -> str:
            return s.labels[s.labels.index(middle) + 1]

        asks.append(
            Ask("order", "order-after", f"What is heard right after the {middle}?", (before, after, *wrong), following)
        )
    return asks


def _counting(scene: Scene) -> list[Ask]:
    label = scene.focus[0]

    def count(s: Scene) -> str:
        return NUMBERS[int(s.relation) - 1]

    return [
        Ask("counting", "counting-choice", f"How many times is the {label} heard?", NUMBERS, count),
        Ask("counting", "counting-often", f"How often does the {label} sound?", NUMBERS, count),
        Ask("counting", "counting-open", f"How many times is the {label} heard?", NUMBERS, count),
    ]


def _change(scene: Scene) -> list[Ask]:
    label, both = scene.focus[0], ("louder", "softer")
    return [
        Ask("attribute", "change-choice", f"Does the {label} get louder or softer?", both, lambda s: s.relation),
        Ask("attribute", "change-how", f"How does the loudness of the {label} change?", both, lambda s: s.relation),
        Ask("attribute", "change-open", f"Does the {label} get louder or softer?", both, lambda s: s.relation),
    ]


def _binding(scene: Scene, wrong: tuple[str, ...]) -> list[Ask]:
    a, b = scene.focus

    def louder(s: Scene) -> str:
        return a if s.relation == "loud" else b

    def softer(s: Scene) -> str:
        return b if s.relation == "loud" else a

    return [
        Ask("attribute", "loudest", "Which sound is the loudest?", (a, b, *wrong), louder),
        Ask("attribute", "softest", "Which sound is the softest?", (a, b, *wrong), softer),
        Ask("attribute", "louder-choice", f"Which sound is louder, the {a} or the {b}?", (a, b), louder),
        Ask("attribute", "softer-open", f"Which is softer, the {a} or the {b}?", (a, b), softer),
    ]


def _grounding(first: Scene, second: Scene, wrong: tuple[str, ...]) -> list[Ask]:
    label = first.focus[0]
    asks = [
        Ask("grounding", "when-choice", f"When is the {label} heard?", PARTS, lambda s: s.relation),
        Ask(
            "grounding", "part-choice", f"In which part of the clip is the {label} heard?", PARTS, lambda s: s.relation
        ),
        Ask("grounding", "when-open", f"When is the {label} heard?", PARTS, lambda s: s.relation),
    ]
    for part in (first.relation, second.relation):
        here = [_at(scene, part) for scene in (first, second)]
        if here[0] and here[1] and here[0] != here[1]:
            article = "in" if part == "middle" else "at"
            text = f"Which sound is heard {article} the {part}?"
            asks.append(Ask("grounding", "which-at", text, (here[0], here[1], *wrong), partial(_at, part=part)))
    return asks


def _at(scene: Scene, part: str) -> str:
    """The sound in a part of the scene, or ""."""
    return next((event.label for event in scene.events if scene.part_of(event) == part), "")
