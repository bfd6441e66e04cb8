"""What is written of a scene: the rows of manifests, readings and truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from af2_ray.config import SceneSet
from af2_ray.synth.facts import Facts
from af2_ray.synth.scenes import Scene
from af2_ray.synth.skills.question import Question
from af2_ray.synth.text.narrate import narrate

Row = dict[str, Any]


@dataclass
class SetRows:
    """All rows of a scene set, or of one of its blocks; each field goes to a file of its own."""

    truth: list[Row] = field(default_factory=list)
    captions: list[Row] = field(default_factory=list)
    questions: list[Row] = field(default_factory=list)
    readings: list[Row] = field(default_factory=list)
    drills: list[Row] = field(default_factory=list)
    drill_readings: list[Row] = field(default_factory=list)

    def add(self, block: SetRows) -> None:
        """Append the rows of a block."""
        for name, rows in vars(block).items():
            getattr(self, name).extend(rows)

    def question(self, question: Question, scenes: SceneSet, scene: Scene) -> Row:
        """A row of NVIDIA's manifest (docs/paper.md, "Data"); the block has its rows of truth and captions already."""
        row: Row = {
            "name": self.truth[question.scene]["name"],
            "prompt": question.prompt,
            "output": question.answer or self.captions[question.scene]["caption"],
            "duration": scene.duration_s,
            "skill": question.skill,
            "template": question.template,
            "num_events": len(scene.events),
        }
        if question.pair:
            row["pair"] = f"{scenes.name}-{scenes.split}-{scene.block}-{question.pair}"
        if question.options:
            row["options"] = question.options
        return row


def reading_row(row: Row, facts: Facts) -> Row:
    """A question about a scene in words."""
    return {"prompt": f"{narrate(facts)} {row['prompt']}", "answer": row["output"]}


def truth_row(scene: Scene, name: str, digest: str) -> Row:
    """All that is known of a scene: seconds, gains in dB, and the SHA-256 of its samples."""
    return {
        "name": name,
        "duration": scene.duration_s,
        "pair": f"{scene.family:06d}",
        "block": scene.block,
        "mirror": scene.mirror,
        "kind": scene.kind,
        "relation": scene.relation,
        "focus": scene.focus,
        "together": scene.together,
        "bed": {"kind": scene.bed_kind, "id": scene.bed.id, "db": round(scene.bed_db, 1)},
        "events": [
            {
                "label": event.label,
                "clip": event.clip.id,
                "onsets_s": event.onsets_s,
                "hit_s": event.hit_s,
                "gains_db": event.gains_db,
                "count": event.count,
            }
            for event in scene.events
        ],
        "audio_sha256": digest,
    }


def mark_gallery(truth: list[Row]) -> None:
    """Mark the first scene of every set of events: scenes marked `gallery` have pairwise different events."""
    seen: set[tuple[str, ...]] = set()
    for row in truth:
        events = tuple(sorted({event["label"] for event in row["events"]}))
        row["gallery"] = events not in seen
        seen.add(events)
