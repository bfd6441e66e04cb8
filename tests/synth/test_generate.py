"""Sets for a file of captions, without the cluster: order, what failed, what it cost, what was paid for before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted

from af2_ray.llm.client import Client
from af2_ray.llm.journal import Journal
from af2_ray.synth import generate
from af2_ray.synth.captions.by_grammar import GrammarCaptions
from af2_ray.synth.captions.by_llm import LlmCaptions
from af2_ray.synth.generate import CaptionMaker, failed_path, make_captions

CAPTIONS = ["a dog followed by a bell", "rain then rain", "a horn while a man speaks", "wind", "a cow"]
SETS = [
    {"text": CAPTIONS[0], "negatives": [{"relation": "class", "text": "a cat followed by a bell"}]},
    {"text": "a bell after a dog", "negatives": [{"relation": "order", "text": "a dog after a bell"}]},
]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    def backwards(items: Any, worker: Any, args: Any, actors: Any) -> Iterator[dict[str, Any]]:
        maker = worker(*args)
        yield from map(maker, reversed(items))

    monkeypatch.setattr(generate, "map_on_ray", backwards)
    return [{"name": f"{n}.flac", "caption": text} for n, text in enumerate(CAPTIONS)]


def grammar(rows: list[dict[str, Any]]) -> GrammarCaptions:
    return GrammarCaptions.of((row["caption"] for row in rows), 2, 2, seed=0)


def test_sets_stand_in_the_order_of_their_captions(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "sets.jsonl"
    assert make_captions(rows, grammar(rows), out, concurrency=1)[0] == 1
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["name"] for row in made] == ["0.flac", "2.flac", "3.flac", "4.flac"]
    assert [json.loads(line)["name"] for line in failed_path(out).read_text().splitlines()] == ["1.flac"]
    whole = CaptionMaker(grammar(rows))({"chunk": 0, "first": 0, "rows": json.dumps(rows)})
    assert [row for row, is_good in json.loads(whole["rows"]) if is_good] == made, "chunks change no draw"
    assert make_captions(rows[:1], grammar(rows), out, concurrency=1)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"sets.jsonl"}


def test_a_cache_of_an_older_version_is_used(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """The name under which a reply lies is part of what users have: a cache is money."""
    llm = Scripted()
    llm.answers = [{"sets": SETS}, {"verdicts": ["all", "none", "none"]}]
    out, cache = tmp_path / "sets.jsonl", tmp_path / "cache"
    engine = LlmCaptions(Client(llm.endpoint), 2, 1, Journal(cache))
    _, spent = make_captions(rows[:1], engine, out, concurrency=1)
    assert (spent["requests"], spent["cached"]) == (2, 0)
    llm.close()
    _, again = make_captions(rows[:1], engine, out, concurrency=1)
    assert (again["requests"], again["cached"]) == (0, 1), "what was spent before is not counted again"
    (kept,) = cache.glob("*/*")
    assert kept.name == "cc962bf213bbaab4fb0614ed618270843473f4f8c3ccc874509a28b45871628c.json"
    assert kept.parent.name == "cc"
    assert json.loads(kept.read_text()) == SETS
