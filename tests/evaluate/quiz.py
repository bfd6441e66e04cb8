"""Questions whose truth a test knows: tones to hear, answers in counterbalanced pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from af2_ray.data.samples import Sample


def question(number: int, answer: str, **changes: Any) -> Sample:
    """A two-way question number `number`, of a pair with its neighbour."""
    facts: dict[str, Any] = {
        "id": f"test/{number}",
        "uri": f"{number}.flac",
        "offset_s": 0.0,
        "duration_s": 8.0,
        "prompt": "Which comes first? (A) low (B) high",
        "answer": answer,
        "task": "QA",
        "dataset": "quiz",
        "skill": "order",
        "options": ("low", "high"),
        "pair": f"pair{number // 2}",
        "template": "first",
    }
    return Sample(**(facts | changes))


def write_corpus(folder: Path, *, num_pairs: int = 4, split: str = "test", words: str | None = None) -> Path:
    """Mirrored two-tone scenes with questions, captions (`words`: a paraphrase) and truth in the corpus' formats."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    labels = ["low", "middle", "high", "shrill"]
    hz = dict(zip(labels, (220, 660, 1760, 4000), strict=True))
    data: dict[str, Any] = {}
    captions, scenes = [], []
    for number in range(2 * num_pairs):
        first, second = labels[number // 2 % 4], labels[(number // 2 + 1 + number // 8) % 4]
        if number % 2:
            first, second = second, first
        half_s = 2.0 + number // 2
        t = np.arange(round(half_s * 16_000)) / 16_000
        mono = np.concatenate([0.5 * np.sin(2 * np.pi * hz[label] * t) for label in (first, second)])
        name = f"{split}/{number:05d}.flac"
        sf.write(folder / name, mono, 16_000)
        clip = {"name": name, "duration": 2 * half_s}
        pair = f"{split}-{number // 2}"
        options = sorted((first, second))
        common = {"name": Path(name).name, "duration": 2 * half_s, "pair": pair}
        prompt = "Which comes first?" + "".join(f" ({'AB'[place]}) {label}" for place, label in enumerate(options))
        data[str(len(data))] = common | {
            "prompt": prompt,
            "output": first,
            "options": options,
            "skill": "order",
            "template": "first",
        }
        data[str(len(data))] = common | {
            "prompt": "Describe the sounds.",
            "output": f"{first}, then {second}",
            "skill": "caption",
        }
        positives = [words.format(first=first, second=second)] if words else []
        captions.append(clip | {"caption": f"{first}, then {second}", "positives": positives, "relations": ["order"]})
        events = [
            {"label": first, "onsets_s": [0.0], "hit_s": half_s, "gains_db": [0.0], "count": 1},
            {"label": second, "onsets_s": [half_s], "hit_s": half_s, "gains_db": [0.0], "count": 1},
        ]
        scenes.append(
            {"name": Path(name).name, "duration": 2 * half_s, "pair": pair, "kind": "order", "events": events}
        )
    manifest = {"split": split, "split_path": split, "flamingo_task": "quiz-QA", "total_num": len(data), "data": data}
    (folder / f"{split}.json").write_text(json.dumps(manifest))
    for kind, rows in (("captions", captions), ("scenes", scenes)):
        (folder / f"{split}.{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
