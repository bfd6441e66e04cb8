"""The skills that questions ask for. A new one is a file of this folder and a line here."""

from __future__ import annotations

from af2_ray.synth.skills import attribute, caption, counting, grounding, identification, order
from af2_ray.synth.skills.question import Skill

# Drills are drawn in this order: another one would change the bytes of a corpus, a line at the end does not.
SKILLS: dict[str, Skill] = {
    "identification": identification.SKILL,
    "order": order.SKILL,
    "grounding": grounding.SKILL,
    "counting": counting.SKILL,
    "attribute": attribute.SKILL,
    "caption": caption.SKILL,
}
# A kind of pair has one skill that asks for what it exchanges.
BY_KIND = {skill.kind: (name, skill.asks) for name, skill in SKILLS.items() if skill.asks}
