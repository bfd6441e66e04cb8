"""What is written of a scene: the rows of manifests, readings and truth."""

from __future__ import annotations

from typing import Any

from af2_ray.config import SceneSet
from af2_ray.synth.captions.sets import Captions
from af2_ray.synth.facts import Facts
from af2_ray.synth.scenes import Scene
from af2_ray.synth.skills.question import Question
from af2_ray.synth.text.narrate import narrate

Row = dict[str, Any]


def question_row(question: Question, scenes: SceneSet, scene: Scene, truth: Row, caption: Row) -> Row:
    """A row of NVIDIA's manifest (docs/paper.md, "Data"); the scene has its rows of truth and captions already."""
    row: Row = {
        "name": truth["name"],
        "prompt": question.prompt,
        "output": question.answer or caption["caption"],
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


def caption_row(name: str, scene: Scene, made: Captions) -> Row:
    """A row of AF-CLAP's caption sets."""
    return {
        "name": name,
        "duration": scene.duration_s,
        "caption": made.caption,
        "positives": made.paraphrases,
        "negatives": made.negatives,
        "relations": [scene.kind],
    }


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
