"""Which sound comes first, last, or after another."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from af2_ray.synth.facts import Facts
from af2_ray.synth.skills.question import Ask, Pair, Rng, Skill

FIRST = ("Which sound is heard first?", "What sound does the clip begin with?")
LAST = ("Which sound is heard last?", "What sound does the clip end with?")


def _asks(pair: Pair, rng: Rng) -> list[Ask]:
    labels = pair.first.labels
    a, b = (labels[int(i)] for i in sorted(rng.choice(len(labels), 2, replace=False)))
    if rng.random() < 0.5:
        a, b = b, a
    ends = (labels[0], labels[-1], *pair.wrong)

    def first(facts: Facts) -> str:
        return facts.labels[0]

    def last(facts: Facts) -> str:
        return facts.labels[-1]

    def earlier(facts: Facts) -> str:
        return min((a, b), key=facts.labels.index)

    asks = [
        Ask("order-first", FIRST[0], ends, first),
        Ask("order-begins", FIRST[1], ends, first),
        Ask("order-last", LAST[0], ends, last),
        Ask("order-ends", LAST[1], ends, last),
        Ask("order-first-of-two", f"Which sound comes first, the {a} or the {b}?", (a, b), earlier),
        Ask("order-first-open", f"Which comes first, the {a} or the {b}?", (a, b), earlier),
    ]
    if len(labels) > 2:
        before, middle, after = labels[:3]  # the counterpart has them the other way round

        def following(facts: Facts) -> str:
            return facts.labels[facts.labels.index(middle) + 1]

        text = f"What is heard right after the {middle}?"
        asks.append(Ask("order-after", text, (before, after, *pair.wrong), following))
    return asks


def _drills(facts: Facts, rng: Rng) -> Iterator[tuple[str, str]]:
    """All sounds in order; who of each two comes first, or last; what begins, ends, or follows."""
    labels = facts.labels
    if facts.together:  # sounds that are heard at the same time have no order
        return
    if rng.random() < 0.5:
        yield "Which sounds are heard, in order?", ", ".join(labels)
    else:
        yield "Which sounds are heard, from last to first?", ", ".join(labels[::-1])
    if len(labels) < 2:
        return
    for earlier, later in combinations(labels, 2):
        a, b = (earlier, later) if rng.random() < 0.5 else (later, earlier)
        word, answer = ("first", earlier) if rng.random() < 0.5 else ("last", later)
        yield f"Which comes {word}, the {a} or the {b}?", answer
    if len(labels) > 2 and rng.random() < 0.2:
        yield f"What is heard right after the {labels[1]}?", labels[2]
    else:
        texts, answer = (FIRST, labels[0]) if rng.random() < 0.5 else (LAST, labels[-1])
        yield str(rng.choice(texts)), answer


SKILL = Skill("order", _asks, _drills)
