"""Ten fine-tunings in one replica: the base's memory once, and the answers of the whole models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import engine_questions
import pytest
import torch
import tuned
from ray import serve
from safetensors.torch import load_file
from torch import Tensor, nn

from af2_ray.config import Serve
from af2_ray.engine.engine import Engine
from af2_ray.engine.graph import Step
from af2_ray.engine.request import Answer, Request
from af2_ray.models.kept import KeepsConstants
from af2_ray.models.parts import Base, opened
from serve_apps import af2
from serve_apps.replica import Model

NUM_PARTS, NUM_TOKENS = 10, 12
TIE = 1e-4  # of logits, within which rounding may choose the other token
KINDS = [tuned.GROUPS, ("lora",), ("lora", "xattn"), ("transform", "xattn", "tokens"), ("lora", "clap")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    torch.set_num_threads(1)
    return tuned.export_base(tmp_path_factory.mktemp("base") / "model", tiny_tokenizer)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, tuple[str, str]]:
    """Whole exports and parts by name: five kinds of fine-tuning, each twice."""
    root = tmp_path_factory.mktemp("stages")
    groups = [KINDS[number % len(KINDS)] for number in range(NUM_PARTS)]
    return {f"p{n}": tuned.stage(base, root / str(n), groups=each, seed=n) for n, each in enumerate(groups)}


@pytest.fixture
def replica(base: Path, stages: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> Model:
    library = logging.getLogger("af2_ray")  # a replica sets it, in a process of its own
    for name in ("handlers", "level"):
        monkeypatch.setattr(library, name, getattr(library, name))
    more = {name: part for name, (_, part) in stages.items()}
    return Model(str(base), Serve(model_name="base", more_models=more, more_models_per_replica=NUM_PARTS, num_slots=4))


async def load_all(replica: Model) -> dict[str, Engine]:
    """The replica's engines by name, every further model loaded."""
    loaded = [await replica._more.load(name) for name in (f"p{number}" for number in range(NUM_PARTS))]
    replica.kept_alive = loaded  # type: ignore[attr-defined]  # as Serve's cache does
    return {one.name: one.runner.engine for one in (replica._main, *loaded)}


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each distinct storage by its address."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def weights(model: nn.Module) -> dict[int, int]:
    return storages([*model.parameters(), *model.buffers()])


def kept(model: nn.Module) -> dict[int, int]:
    """Storages of what modules have made of their weights and keep."""
    made = [made for m in model.modules() if isinstance(m, KeepsConstants) for _, made in m._kept.values()]
    return storages(t for one in made for t in (one if isinstance(one, tuple) else (one,)) if t is not None)


def written(part: str) -> int:
    """Bytes of the tensors in a part's files."""
    return sum(tensor.nbytes for path in Path(part).glob("*.safetensors") for tensor in load_file(path).values())


def questions(number: int) -> list[Request]:
    clips = [engine_questions.clip(1.5 + number, 200.0 + 90 * number), engine_questions.clip(12.0, 330.0)]
    settings: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "top_logprobs": 10}
    return [
        Request(f"which sound is heard? {number}", (clips[0],), **settings),
        Request("a dog barks before", (clips[1],), **settings),
        Request("which of both is the phone?", tuple(clips), **settings),
        Request(f"a bell rings {number} times", (), **settings),
    ]


def test_ten_parts_take_the_base_once(replica: Model, stages: dict[str, tuple[str, str]]) -> None:
    """Distinct storages are the base's once and each part's own; what modules keep is not made again for a part."""

    async def use() -> None:
        engines = await load_all(replica)
        for number, engine in enumerate(engines.values()):
            assert all(isinstance(answer, Answer) for answer in engine.answer(questions(number)))
        base = engines.pop("base").model
        every, made = weights(base), kept(base)
        whole = sum(every.values())
        for name, engine in engines.items():
            own = weights(engine.model).items() - every.items()
            assert sum(size for _, size in own) == written(stages[name][1]), name
            every |= dict(own)
            if engine.model.audio_tower is base.audio_tower:
                assert not kept(engine.model).keys() - made.keys(), name
        assert sum(every.values()) == whole + sum(written(part) for _, part in stages.values())
        assert len(kept(base)) == len(made) > 0

    asyncio.run(use())


def test_parts_answer_as_their_whole_models(replica: Model, stages: dict[str, tuple[str, str]]) -> None:
    """Greedy answers to four questions each, from all engines at one time; they part only at a tie."""

    async def use() -> None:
        engines = await load_all(replica)
        num_ties, texts = 0, set()
        for number, (name, (whole, _)) in enumerate(stages.items()):
            ours = engines[name].answer(questions(number))
            theirs = Engine.from_pretrained(whole, "cpu", Serve(num_slots=4)).answer(questions(number))
            bare = engines["base"].answer(questions(number))
            assert [one.text for one in ours] != [one.text for one in bare], "the part changes answers"  # type: ignore[union-attr]
            for one, other in zip(ours, theirs, strict=True):
                assert isinstance(one, Answer)
                assert isinstance(other, Answer)
                texts.add(one.text)
                num_ties += differs_by_a_tie(one, other)
        assert len(texts) > 2 * NUM_PARTS, "answers tell the models apart"
        assert num_ties <= 2, f"{num_ties} of {4 * NUM_PARTS} answers go another way from a tie on"

    asyncio.run(use())


def differs_by_a_tie(one: Answer, other: Answer) -> bool:
    """Whether two answers part, which they may where their tokens' logits are within 1e-4 of one another."""
    for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
        if mine.token != theirs.token:
            assert theirs.logprob - dict(theirs.top)[mine.token] < TIE
            return True
        assert abs(mine.logprob - theirs.logprob) < TIE
    return False


def test_the_base_answers_while_parts_come(replica: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share its tower, in threads of their own, and each that comes makes the tower drop what it keeps."""
    monkeypatch.setattr(serve, "get_multiplexed_model_id", lambda: "")

    async def use() -> None:
        asked = questions(3)
        expected = [await replica.answer(request) for request in asked]
        loading = asyncio.ensure_future(load_all(replica))
        num_rounds = 0
        while not loading.done():
            await replica.forget([clip.key for request in asked for clip in request.clips])
            for one, other in zip([await replica.answer(request) for request in asked], expected, strict=True):
                assert isinstance(one, Answer)
                assert isinstance(other, Answer)
                assert not differs_by_a_tie(one, other)
            num_rounds += 1
        await loading
        assert num_rounds > 3

    asyncio.run(use())


class Relauncher:
    """A recorder that launches a step again, as a GPU would from its recording."""

    def record(self, step: Step) -> Step:
        return step

    def forget(self) -> None:
        pass


def test_recorded_steps_have_the_adapters(base: Path, stages: dict[str, tuple[str, str]], tiny_tokenizer: Any) -> None:
    """The way of a GPU: rows of a fixed size, over the part's layers."""
    with opened(stages["p0"][1], Base(str(base), Engine.from_pretrained(str(base), "cpu").model)) as (model, _):
        pass
    engine = Engine(model, tiny_tokenizer, Serve(num_slots=4), recorder=Relauncher())
    plain = Engine.from_pretrained(stages["p0"][0], "cpu", Serve(num_slots=4))
    for _ in range(2):
        answers = [whole.answer(questions(0)) for whole in (engine, plain)]
        for one, other in zip(*answers, strict=True):
            assert isinstance(one, Answer)
            assert isinstance(other, Answer)
            assert not differs_by_a_tie(one, other)
    assert engine.graphs is not None
    assert engine.graphs.num_replayed > 0


def test_a_part_of_another_model_is_an_error_at_the_start(
    base: Path, stages: dict[str, tuple[str, str]], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    other = tuned.export_base(tmp_path / "other", tiny_tokenizer, seed=5)
    more = f"serve.more_models.mine={stages['p0'][1]}"
    with pytest.raises(ValueError, match=r"serve\.more_models\.mine: .* is a part of .*: name the model that the part"):
        af2.app({"model": str(other), "recipe": "tiny", "overrides": more})
    with pytest.raises(ValueError, match=r"serve\.more_models\.mine: .* is a part of"):
        Model(str(other), Serve(more_models={"mine": stages["p0"][1]}))
    with pytest.raises(ValueError, match="is a small part of a model"):
        af2.app({"model": stages["p0"][1], "recipe": "tiny"})
    with pytest.raises(ValueError, match="is a small part of a model"):
        Engine.from_pretrained(stages["p0"][1], "cpu")
    af2.app({"model": str(base), "recipe": "tiny", "overrides": more})
