"""Several models behind one address: each answers for itself, and none is kept that nobody asks for."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import serve_toy

from af2_ray.config import load_recipe
from af2_ray.engine.engine import Engine
from af2_ray.engine.request import Clip
from serve_apps import af2
from serve_apps.decode_process import read_recording
from serve_apps.limits import Limits

NAMES = ("af2-tiny", "second", "third", "broken")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    """A folder a model, of different weights; the last one's are damaged."""
    root = tmp_path_factory.mktemp("models")
    made = {name: serve_toy.export(root / name, tiny_tokenizer, seed=seed) for seed, name in enumerate(NAMES)}
    (made["broken"] / "model.safetensors").write_bytes(b"no weights")
    return made


@pytest.fixture(scope="module")
def client(ray_cluster: Any, folders: dict[str, Path]) -> Iterator[openai.OpenAI]:
    more = [f"serve.more_models.{name}={folder}" for name, folder in folders.items() if name != "af2-tiny"]
    with af2.run_app(folders["af2-tiny"], "tiny", overrides=[*more, "serve.max_new_tokens=24"]) as url:
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, name: str, audio: bytes, *, stream: bool = False) -> str:
    answer = client.chat.completions.create(**serve_toy.chat(audio, model=name), max_tokens=20, stream=stream)
    if not stream:
        return str(answer.choices[0].message.content)
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer)


def test_every_name_is_answered_by_its_own_model(client: openai.OpenAI, folders: dict[str, Path]) -> None:
    """Two further models take turns in the one place there is; what one has heard, another is not believed to know."""
    audio = serve_toy.wav(12)
    limits = Limits.of(load_recipe("tiny", ["serve.max_new_tokens=24"]).serve)
    expected = {}
    for name in NAMES[:3]:
        body = serve_toy.chat(audio, model="af2-tiny") | {"max_tokens": 20}
        clip = Clip.of(read_recording(audio, "audio", 60.0).windows)
        (request,) = limits.to_engine(limits.read(json.dumps(body).encode()), "1", [clip])
        (answer,) = Engine.from_pretrained(str(folders[name]), "cpu").answer([request])
        expected[name] = answer.text
    assert len(set(expected.values())) == 3, "different weights"
    assert [model.id for model in client.models.list()] == list(NAMES)
    for name in (*NAMES[:3], *NAMES[:3]):
        assert ask(client, name, audio) == expected[name]
        assert ask(client, name, audio, stream=True) == expected[name]
    # All at once, on a replica that can hold one of the two further ones: what is being written is written to its end.
    asked = NAMES[:3] * 6
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        assert list(pool.map(lambda name: ask(client, name, audio), asked)) == [expected[name] for name in asked]


def test_a_model_that_does_not_load_fails_alone(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="'broken' cannot be loaded"):
        ask(client, "broken", serve_toy.wav(1))
    assert ask(client, "second", serve_toy.wav(1))
    with pytest.raises(openai.NotFoundError, match="this server has 'af2-tiny', 'second', 'third', 'broken'"):
        ask(client, "fourth", serve_toy.wav(1))


def test_names_that_are_taken_and_folders_that_are_not_there(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="taken already"):
        load_recipe("tiny", ["serve.more_models.af2-tiny=x"])
    with pytest.raises(ValueError, match="no model in"):
        af2.app({"model": str(folders["second"]), "recipe": "tiny", "overrides": "serve.more_models.a=nowhere"})
