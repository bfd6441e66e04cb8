"""The application over HTTP, as OpenAI's own client and a hostile one see it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import openai
import pytest
import serve_toy
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from af2_ray.config import Serve
from af2_ray.serve.schemas import ApiError
from serve_apps import af2
from serve_apps.ingress import Ingress

OVERRIDES = ("serve.max_new_tokens=24", "serve.max_body_mb=4", "serve.max_audio_s=60")
MODEL = "af2-tiny"  # as recipe `tiny` calls it


@pytest.fixture(scope="module")
def url(ray_cluster: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = serve_toy.export(tmp_path_factory.mktemp("served"), tiny_tokenizer)
    with af2.run_app(folder, "tiny", overrides=OVERRIDES) as url:
        yield url


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, *audios: bytes, **more: Any) -> Any:
    return client.chat.completions.create(**serve_toy.chat(*audios, model=MODEL, **more))


def post(url: str, body: bytes, path: str = "/chat/completions") -> tuple[int, Any]:
    request = urllib.request.Request(url + path, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize(
    ("errors", "status", "retry_after_s"),
    [
        ([RayActorError()], None, None),
        ([RayActorError(), RayActorError()], 503, 5),
        ([BackPressureError(num_queued_requests=9, max_queued_requests=8)], 429, 5),
        ([TimeoutError()], 408, None),
    ],
)
def test_what_goes_wrong_behind_the_ingress(
    errors: list[Exception], status: int | None, retry_after_s: int | None
) -> None:
    """A replica's death is survived once; pressure and time become errors a client knows how to treat."""
    ingress = Ingress(cast(Any, None), Serve())

    async def ask() -> str:
        if errors:
            raise errors.pop(0)
        return "hello"

    if status is None:
        assert asyncio.run(ingress._retried(ask)) == "hello"
    else:
        with pytest.raises(ApiError) as caught:
            asyncio.run(ingress._retried(ask))
        assert (caught.value.status, caught.value.retry_after_s) == (status, retry_after_s)
    assert not errors


def test_what_the_app_refuses_to_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AF2_MODEL", raising=False)
    with pytest.raises(ValueError, match="which model"):
        af2.app({})
    monkeypatch.setenv("AF2_MODEL", str(tmp_path))
    with pytest.raises(ValueError, match="no model in"):
        af2.app({})
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="overrides need a recipe"):
        af2.app({"overrides": "serve.max_replicas=2"})
    with pytest.raises(ValueError, match="serve: min_replicas=3 exceeds"):
        af2.app({"recipe": "tiny", "overrides": "serve.min_replicas=3"})
    with pytest.raises(ValueError, match="modell"):
        af2.app({"modell": "x"})


def test_models_and_health(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=10) as response:
        assert json.load(response) == {"status": "ok", "model": MODEL}


def test_whole_and_streamed_answers_are_the_same(client: openai.OpenAI) -> None:
    audio = serve_toy.wav(12.5)
    whole = ask(client, audio, max_tokens=20)
    assert whole.choices[0].message.content
    assert whole.choices[0].finish_reason in {"stop", "length"}
    usage = whole.usage
    assert 0 < usage.completion_tokens <= 20
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.audio_seconds == 12.5

    stream = ask(client, audio, max_tokens=20, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage == usage


def test_several_answers_with_log_probabilities(client: openai.OpenAI) -> None:
    asked = {"n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    whole = ask(client, serve_toy.wav(3), **asked)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.choices[0].message.content != whole.choices[1].message.content
    place = whole.choices[0].logprobs.content[0]
    assert place.logprob <= place.top_logprobs[0].logprob <= 0
    texts = ["", ""]
    for chunk in ask(client, serve_toy.wav(3), stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_a_further_question_of_a_long_clip(client: openai.OpenAI) -> None:
    audio = serve_toy.wav(55)
    first = ask(client, audio, max_tokens=6).choices[0].message.content
    assert ask(client, audio, max_tokens=6).choices[0].message.content == first
    assert ask(client, audio, text="and then?", max_tokens=6).usage.prompt_tokens_details is not None


def test_answers_at_once_equal_answers_alone(client: openai.OpenAI) -> None:
    questions = [
        {"audios": [serve_toy.wav(1 + 4 * number, hz=200.0 * number)] * (number % 3), "text": f"question {number}?"}
        for number in range(1, 7)
    ]

    def answer(question: dict[str, Any]) -> str:
        return ask(client, *question["audios"], text=question["text"], max_tokens=16).choices[0].message.content

    alone = [answer(question) for question in questions]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(answer, questions)) == alone


def test_bad_requests_are_told_so_and_harm_nobody(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError, match="not an audio file"):
        ask(client, b"PK\x03\x04 a zip named wav")
    with pytest.raises(openai.BadRequestError, match="which the model reserves"):
        ask(client, text="<audio> hello")
    with pytest.raises(openai.BadRequestError, match="longer than 512 tokens"):
        ask(client, text="words " * 2000, stream=True)
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5' here"):
        client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "hello"}])
    with pytest.raises(openai.APIStatusError, match="more than 60 s") as too_long:
        ask(client, serve_toy.wav(61))
    assert too_long.value.status_code == 413
    assert post(url, b" " * (5 * 2**20))[0] == 413
    assert post(url, b"{")[1]["error"]["code"] == "invalid_json"
    assert post(url, b"{}", "/nothing")[0] == 404
    assert ask(client, serve_toy.wav(2)).choices[0].message.content
