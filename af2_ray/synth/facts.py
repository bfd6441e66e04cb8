"""What is known of a clip, whether it was composed or recorded: all that captions, questions and texts are made from.

A composed scene knows everything (`scenes.facts_of`). A recording may have labels in order and nothing else: what is
not known keeps its default, and what needs it says so. So text, skills and captions never see how a clip was made, and
a reader of other annotations is one more function that returns `Facts`. The price is one copy of a scene's truth:
20 microseconds a scene, where rendering ten seconds takes 5 milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("beginning", "middle", "end")
MAX_COUNT = 4
SOUND = "sound"  # the kind of clips of one sound, whose counterpart has another


@dataclass(frozen=True)
class Sound:
    """One sound of a clip, heard once or several times.

    Attributes:
        label: its class, lower case.
        attribute: word that a caption has for it: "", a count ("3"), loud, soft, louder, softer, or one of `PARTS`.
        place: one of `PARTS` in which its middle lies; "" where that is not known.
    """

    label: str
    attribute: str = ""
    place: str = ""


@dataclass(frozen=True)
class Facts:
    """What is known of a clip.

    Attributes:
        sounds: everything that is heard, in order of first start.
        kind: relation in which the clip's counterpart, of the same sounds, differs (`SOUND`, or a kind that a skill of
            `skills.questions` asks about); "" where it has none.
        relation: value of that relation here: forward or reversed, the number of times, loud or soft (the first focus
            sound against the second), louder or softer (in time), one of `PARTS`.
        focus: labels of the sounds that the relation is about.
        together: True where the two focus sounds are heard at the same time.
    """

    sounds: tuple[Sound, ...]
    kind: str = ""
    relation: str = ""
    focus: tuple[str, ...] = ()
    together: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes in order of first start."""
        return tuple(sound.label for sound in self.sounds)
