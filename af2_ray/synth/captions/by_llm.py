"""Captions by a large language model: paraphrases and wrong captions, each one checked.

A model writes more freely than the grammar, and sometimes what was not asked for: a paraphrase that adds a sound, a
wrong caption that says the same in other words. So nothing of it is believed: `faults` compares the words of what came
back with what each relation may change, and a second request asks which of the wrong captions could still be true.
What fails goes back to the model with the reason, and it may try again; what fails to the end is an error that names
the caption. A set costs two requests where the first try holds, and two more for each further try.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from af2_ray.llm.client import Client, NoReply, Spent
from af2_ray.llm.journal import Journal
from af2_ray.llm.judge import judge
from af2_ray.synth.captions.sets import Captions

RELATIONS = ("order", "binding", "count", "position", "loudness", "class")


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


_NUMBERS = _words("a an once twice one two three four five six several many few times time again")
_PLACES = _words("beginning start middle end at in the first last finally early late")
_LOUDNESS = _words("loud soft louder softer quiet quieter loudly softly quietly faint getting becoming growing")
_JOINS = _words("and then while with as before after followed preceded by later it is there are of we hear sound")
_MAY_CHANGE = {
    "order": set(_JOINS),
    "binding": set[str](),
    "count": set(_NUMBERS),
    "position": set(_PLACES),
    "loudness": set(_LOUDNESS),
}
_COUNTS = {word: number for number, word in enumerate(_words("two three four five six"), 2)} | {"twice": 2}
_BACKWARD, _TOGETHER = {"after", "preceded"}, {"while", "as", "with"}
_VERSION = 2  # of the request: another one is another answer

_TASK = """You write captions of recordings. Given a caption, write {positives} paraphrases of it that name the same
sounds in the same order with the same attributes, and for the caption and for each paraphrase {negatives} wrong
captions. A wrong caption keeps the wording of the one it belongs to and changes exactly one relation: the order of
sounds, which sound an attribute belongs to (binding), a count, a position in time, a change of loudness, or one sound
for another (class; only where nothing else can be changed). A wrong caption must be false of every recording that the
caption is true of. Never add what the caption does not say."""
_JUDGE = """For each of the numbered texts: of the recordings that the caption is true of, is it true of `all`, of
`some` or of `none`? Answer with one of these words a text, in order."""


@dataclass
class LlmCaptions:
    """Captions of captions by an LLM.

    Args:
        client: the model.
        num_positives: M of AF-CLAP (docs/paper.md, "AF-CLAP"): the caption and M - 1 paraphrases.
        num_negatives: N of AF-CLAP: wrong captions for each of these M.
        journal: caption sets of earlier calls; none: every caption is asked for anew.
        attempts: number of times that the model may write a set before it is given up.
        judged: True where a second request asks whether paraphrases are true and wrong captions false.
    """

    client: Client
    num_positives: int = 3
    num_negatives: int = 3
    journal: Journal | None = None
    attempts: int = 3
    judged: bool = True

    @property
    def spent(self) -> Spent:
        """What the requests have cost."""
        return self.client.spent

    def __call__(self, caption: str, number: int = 0) -> Captions:
        """The set of a caption, whatever its number.

        Raises:
            ValueError: the model wrote none that holds, or the endpoint refused; the message has the reason.
        """
        model, sizes = self.client.endpoint.model, (self.num_positives, self.num_negatives)
        deciding = [_VERSION, _TASK, self.judged, model, caption, *sizes]
        if self.journal and (known := self.journal.read(deciding)):
            self.spent["cached"] += 1
            return _captions(caption, known)
        task = _TASK.format(positives=self.num_positives - 1, negatives=self.num_negatives)
        asked = f"Caption: {caption}\nThe first set is the caption itself, unchanged."
        messages = [{"role": "system", "content": task}, {"role": "user", "content": asked}]
        fault = partial(self._fault, caption)
        try:
            sets = self.client.reply_that_holds(messages, "sets", _schema(*sizes), fault, self.attempts)
        except NoReply as error:
            raise ValueError(f"no usable captions for {caption!r}: {error}") from error
        if self.journal:
            self.journal.write(deciding, sets)
        return _captions(caption, sets)

    def _fault(self, caption: str, sets: Any) -> str:
        """What is wrong with a set by its words, or by the judge; empty: nothing."""
        sets = sets if isinstance(sets, list) else []
        return faults(caption, sets, self.num_positives, self.num_negatives) or self._untrue(caption, sets)

    def _untrue(self, caption: str, sets: Sequence[dict[str, Any]]) -> str:
        """The first paraphrase that need not be true or wrong caption that could be, as a reason; empty: none."""
        paraphrases = [one["text"] for one in sets[1:]]
        texts = [*paraphrases, *(each["text"] for one in sets for each in one["negatives"])]
        if not self.judged or not texts:
            return ""
        verdicts = judge(self.client, _JUDGE, f"Caption: {caption}", texts, ("all", "some", "none"))
        if not verdicts:
            return "the check of the set came back incomplete"
        for place, (text, verdict) in enumerate(zip(texts, verdicts, strict=True)):
            if place < len(paraphrases) and verdict != "all":
                return f"the paraphrase {text!r} says more or other than the caption"
            if place >= len(paraphrases) and verdict != "none":
                return f"{text!r} could be true too"
        return ""


def faults(caption: str, sets: Any, num_positives: int, num_negatives: int) -> str:
    """What is wrong with a set by its words alone; empty: nothing.

    A wrong caption may differ from its own text in the words of the relation it names: in order, joins aside, by the
    same words in another order; in binding by the same words; in a count, a place, a loudness by such words; in class
    by what it names. So a paraphrase sold as a wrong caption, or one wrong in two ways, is found.
    """
    try:
        texts = [str(one["text"]) for one in sets]
        negatives = [[(str(each["relation"]), str(each["text"])) for each in one["negatives"]] for one in sets]
    except (KeyError, TypeError):
        return "it is not of the form that was asked for"
    if len(texts) != num_positives or any(len(group) != num_negatives for group in negatives):
        return f"there must be {num_positives} sets of {num_negatives} wrong captions each"
    if _plain(texts[0]) != _plain(caption):
        return "the first set must be of the caption itself, unchanged"
    if len({_plain(text) for text in texts}) < len(texts):
        return "two of the paraphrases are the same"
    numbers = _counts(caption)
    for text, group in zip(texts, negatives, strict=True):
        if _counts(text) != numbers:
            return f"{text!r} has other numbers than the caption"
        if len({_plain(wrong) for _, wrong in group}) < len(group):
            return f"two wrong captions of {text!r} are the same"
        for relation, wrong in group:
            if reason := _wrongly_wrong(texts, text, relation, wrong):
                return reason
    return ""


def _wrongly_wrong(texts: Sequence[str], text: str, relation: str, wrong: str) -> str:
    if relation not in RELATIONS:
        return f"{relation!r} is none of the relations: {', '.join(RELATIONS)}"
    if _plain(wrong) in {_plain(each) for each in texts}:
        return f"{wrong!r} is one of the true captions"
    before, after = Counter(_words(text)), Counter(_words(wrong))
    changed = set(before - after) | set(after - before)
    if relation == "class":
        return "" if after - before else f"{wrong!r} names no other sound"
    if extra := {word for word in changed if not word.isdigit()} - _MAY_CHANGE[relation]:
        return f"{wrong!r} is to be wrong in {relation} alone, and changes {sorted(extra)[0]!r} too"
    if relation == "order" and _in_time(wrong) == _in_time(text):
        return f"{wrong!r} tells of the same order"
    if relation in ("count", "position", "loudness") and not changed:
        return f"{wrong!r} changes no word of {relation}"
    return ""


def _counts(text: str) -> set[int]:
    """The numbers from two on that a text names."""
    words = _words(text)
    return {int(word) for word in words if word.isdigit()} | {_COUNTS[word] for word in words if word in _COUNTS}


def _in_time(text: str) -> tuple[list[str], bool, bool]:
    """What says an order: the words besides joins in their order, and whether joins turn or undo it."""
    words = _words(text)
    return [word for word in words if word not in _JOINS], bool({*words} & _BACKWARD), bool({*words} & _TOGETHER)


def _plain(text: str) -> str:
    return " ".join(_words(text))


def _schema(num_positives: int, num_negatives: int) -> dict[str, Any]:
    wrong = {
        "type": "object",
        "properties": {"relation": {"enum": list(RELATIONS)}, "text": {"type": "string"}},
        "required": ["relation", "text"],
        "additionalProperties": False,
    }
    group = {"type": "array", "items": wrong, "minItems": num_negatives, "maxItems": num_negatives}
    one = {
        "type": "object",
        "properties": {"text": {"type": "string"}, "negatives": group},
        "required": ["text", "negatives"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": one, "minItems": num_positives, "maxItems": num_positives}


def _captions(caption: str, sets: Sequence[dict[str, Any]]) -> Captions:
    negatives = tuple(tuple(each["text"] for each in one["negatives"]) for one in sets)
    return Captions(caption, tuple(one["text"] for one in sets[1:]), negatives)
