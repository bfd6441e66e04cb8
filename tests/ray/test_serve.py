"""The application over HTTP, as OpenAI's own client and a hostile one see it."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import hostile
import hypothesis
import numpy as np
import openai
import psutil
import pytest
import schemathesis
import serve_toy
from hypothesis import HealthCheck
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks as openapi_checks

from serve_apps import af2
from serve_apps.asking import Asking
from serve_apps.schemas import ApiError
from serve_apps.telemetry import merged

OVERRIDES = (
    *("serve.max_new_tokens=24", "serve.max_body_mb=4", "serve.max_audio_s=60"),
    "serve.audio_url_hosts=['*']",
)
MODEL = "af2-tiny"  # as recipe `tiny` calls it


@pytest.fixture(scope="module")
def url(ray_cluster: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = serve_toy.export(tmp_path_factory.mktemp("served"), tiny_tokenizer)
    clap = serve_toy.export_clap(tmp_path_factory.mktemp("clap"), tiny_tokenizer)
    with af2.run_app(folder, "tiny", overrides=OVERRIDES, clap=clap) as url:
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
    ],
)
def test_what_goes_wrong_behind_the_ingress(
    errors: list[Exception], status: int | None, retry_after_s: int | None
) -> None:
    """A replica's death is survived once; pressure becomes an error that a client knows how to treat."""

    async def ask() -> str:
        if errors:
            raise errors.pop(0)
        return "hello"

    if status is None:
        assert asyncio.run(Asking().retried(ask, "hello")) == "hello"
    else:
        with pytest.raises(ApiError) as caught:
            asyncio.run(Asking().retried(ask, "hello"))
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
    assert [model.id for model in client.models.list()] == [MODEL, f"{MODEL}-clap"]
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


def test_embeddings_of_texts_and_recordings_and_labels(client: openai.OpenAI, url: str) -> None:
    """Through OpenAI's client, which asks for base64, and by plain HTTP: the same unit vectors."""
    model, audio = f"{MODEL}-clap", serve_toy.audio_part(serve_toy.wav(12))
    texts = client.embeddings.create(model=model, input=["a bell", "a dog barks"])
    body = {"model": model, "input": [audio, "a bell"]}
    status, mixed = post(url, json.dumps(body).encode(), "/embeddings")
    assert status == 200, mixed
    assert [item["index"] for item in mixed["data"]] == [0, 1]
    assert mixed["usage"]["prompt_tokens_details"]["audio_seconds"] == 12
    np.testing.assert_allclose(mixed["data"][1]["embedding"], texts.data[0].embedding, atol=1e-6)
    heard, bell, bark = mixed["data"][0]["embedding"], *(item.embedding for item in texts.data)
    assert np.linalg.norm(heard) == pytest.approx(1, abs=1e-5)

    labels = {"model": model, "input": audio, "candidate_labels": ["bell", "dog barks"], "hypothesis_template": "a {}"}
    status, ranked = post(url, json.dumps(labels).encode(), "/audio/labels")
    assert status == 200, ranked
    fit = np.exp(np.array([np.dot(heard, bell), np.dot(heard, bark)]) / 0.07)
    scores = {item["label"]: item["score"] for item in ranked["data"]}
    np.testing.assert_allclose([scores["bell"], scores["dog barks"]], fit / fit.sum(), atol=1e-4)
    assert ranked["data"][0]["score"] == max(scores.values())

    for wrong, message in (
        ({"input": [[1, 2]]}, "token ids"),
        ({"input": "a", "dimensions": 4}, "not shortened"),
        ({"input": "words " * 400}, "more than the 77 of this model"),
        ({"input": " "}, "a text is empty"),
        ({"input": [serve_toy.audio_part(b"none")]}, "not an audio file"),
        ({"input": "a", "model": MODEL}, "no model"),
    ):
        status, told = post(url, json.dumps({"model": model, **wrong}).encode(), "/embeddings")
        assert 400 <= status < 500, told
        assert message in told["error"]["message"]
        assert told["error"]["param"] in {"input", "dimensions", "model"}, told


def test_bad_requests_are_told_so_and_harm_nobody(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError, match="not an audio file"):
        ask(client, b"PK\x03\x04 a zip named wav")
    with pytest.raises(openai.BadRequestError, match="which the model reserves"):
        ask(client, text="<audio> hello")
    with pytest.raises(openai.BadRequestError, match="longer than 1023 tokens"):
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


def test_the_curl_commands_of_the_documents(url: str, tmp_path: Path) -> None:
    pages = [(Path(__file__).parents[2] / name).read_text() for name in ("README.md", "docs/serving.md")]
    commands = re.findall(r"```bash\n(curl .*?)```", "".join(pages), re.DOTALL)
    assert len(commands) == 2
    (tmp_path / "clip.wav").write_bytes(serve_toy.wav(20))  # more than fits into an argument of a command
    for command in commands:
        here = command.replace("localhost:8000", url.removeprefix("http://").removesuffix("/v1"))
        done = subprocess.run(["bash", "-c", here], cwd=tmp_path, capture_output=True, timeout=60, check=True)
        told = json.loads(done.stdout)
        assert told["usage"]["prompt_tokens_details"]["audio_seconds"] == 20, told


def test_hostile_requests_leave_no_memory_behind(client: openai.OpenAI, url: str) -> None:
    """Each a 4xx over HTTP too, again and again: eight hours of silence in 100 KB, 1000 channels and the like."""
    bodies = hostile.bodies(MODEL)
    assert len(bodies) >= 30

    def memory_after(rounds: int) -> float:
        for body in bodies * rounds:
            status, told = post(url, body)
            assert 400 <= status < 500, told
            assert len(told["error"]["message"]) > 20
        pids = serve_toy.pids("Ingress") + serve_toy.pids("Model")
        assert len(pids) == 2
        return sum(psutil.Process(pid).memory_info().rss for pid in pids) / 2**20

    before = memory_after(3)
    assert memory_after(10) < before + 30
    assert ask(client, serve_toy.wav(2)).choices[0].message.content


@pytest.fixture(scope="module")
def openapi(url: str) -> Any:
    """What the server says of itself, with names and recordings that it has: a random one would never get far."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/openapi.json", timeout=30) as response:
        document = json.load(response)
    schemas = document["components"]["schemas"]
    for name in ("ChatRequest", "EmbeddingRequest", "LabelRequest"):
        schemas[name]["properties"]["model"] = {"enum": [MODEL if name == "ChatRequest" else f"{MODEL}-clap"]}
    sounds = [serve_toy.wav(1), serve_toy.wav(11, rate=8000), b"", b"RIFF and nothing else"]
    schemas["InputAudio"]["properties"]["data"] = {"enum": [base64.b64encode(sound).decode() for sound in sounds]}
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url.removesuffix("/v1"))
    return schema


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings", "/v1/audio/labels"])
def test_whatever_is_sent_is_answered_as_documented(openapi: Any, path: str, mode: GenerationMode) -> None:
    """Requests made from the OpenAPI document, right and wrong ones: no 500, no hang, answers of the stated shape."""

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @hypothesis.given(case=next(iter(openapi[path].values())).as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        response = case.call(timeout=30)
        statuses.append(response.status_code)
        case.validate_response(
            response,
            checks=[
                schemathesis.checks.not_a_server_error,
                openapi_checks.status_code_conformance,
                openapi_checks.content_type_conformance,
                openapi_checks.response_schema_conformance,
            ],
        )

    statuses: list[int] = []
    check()
    assert any(status >= 400 for status in statuses)
    assert any(status == 200 for status in statuses) == (mode is GenerationMode.POSITIVE)


@pytest.mark.skipif(chromium.BINARY is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [900, 390], ids=["desk", "phone"])
def test_a_recording_is_asked_on_the_page(url: str, tmp_path: Path, width: int) -> None:
    """Uploaded, seen, asked twice: the answers are the API's own, and nothing is wider than the screen."""
    recording = tmp_path / "tone.wav"
    recording.write_bytes(serve_toy.wav(12, hz=500))

    async def use() -> None:
        async with chromium.opened(url.removesuffix("/v1") + "/", width=width) as page:
            await page.until(f"at('model').textContent === '{MODEL}'")
            assert await page.value("at('send').disabled")
            await page.upload("#file", recording)
            await page.until("!at('clip').hidden && !at('send').disabled")
            assert "12.0 s" in await page.value("at('about').textContent")
            brightest = "(() => { const c = at('mel'), d = c.getContext('2d').getImageData(c.width / 2, 0, 1, 64).data;"
            brightest += "return [...Array(64).keys()].sort((a, b) => d[4 * b] - d[4 * a])[0]; })()"
            assert 50 <= await page.value(brightest) <= 53, "500 Hz is band 11 or 12 of 64 from the bottom"
            for number, question in enumerate(("which sound is heard?", "and how loud?"), start=1):
                await page.value(f"at('question').value = '{question}'; at('ask').requestSubmit()")
                done = (
                    "document.querySelectorAll('#answers article').length === {} && !document.querySelector('.writing')"
                )
                await page.until(done.format(number))
                told = await page.value("document.querySelector('#answers .answer').textContent")
                body = {"messages": [{"role": "user", "content": [serve_toy.audio_part(recording.read_bytes())]}]}
                body["messages"][0]["content"].append({"type": "text", "text": question})
                status, answer = post(url, json.dumps({"model": MODEL, **body}).encode())
                assert status == 200, answer
                assert told == answer["choices"][0]["message"]["content"]
            assert await page.value("document.documentElement.scrollWidth") <= width
            if folder := os.environ.get("AF2_SCREENSHOTS"):
                await page.screenshot(Path(folder) / f"page-{width}.png")
            assert page.errors == []

    asyncio.run(use())


def test_metrics_of_all_nodes_add_up_to_the_requests(client: openai.OpenAI, url: str) -> None:
    def told() -> dict[str, float]:
        with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        samples = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        sums: dict[str, float] = {}
        for name, value in samples:
            if f'model="{MODEL}"' in name:
                family = name.partition("{")[0].removeprefix("ray_").removesuffix("_total")
                sums[family] = sums.get(family, 0.0) + float(value)
        return sums

    def settled() -> dict[str, float]:
        """The counts once they have stood still for longer than the second between reports, and some more."""
        last, since, deadline = told(), time.monotonic(), time.monotonic() + 90
        while "af2_requests" not in last or time.monotonic() < since + 4:
            assert time.monotonic() < deadline, last
            time.sleep(0.5)
            now = told()
            if now != last:
                last, since = now, time.monotonic()
        return last

    ask(client, serve_toy.wav(15, hz=777), max_tokens=5, n=2)
    before = settled()
    assert before["af2_windows_asked"] >= before["af2_windows_encoded"] >= 2, before
    tokens = ask(client, serve_toy.wav(15, hz=777), max_tokens=5, n=2).usage.completion_tokens
    after = settled()
    assert after["af2_requests"] == before["af2_requests"] + 2
    assert after["af2_new_tokens"] == before["af2_new_tokens"] + tokens
    assert after["af2_windows_encoded"] == before["af2_windows_encoded"], "heard before"
    assert after["af2_running"] == after["af2_waiting"] == 0


def test_expositions_of_several_nodes_become_one() -> None:
    head = "# HELP ray_af2_requests x\n# TYPE ray_af2_requests counter\n"
    one = head + 'ray_af2_requests{node="a"} 1\n# TYPE python_gc gauge\npython_gc 3\n'
    assert merged([one, "", head + 'ray_af2_requests{node="b"} 2\n']) == (
        head + 'ray_af2_requests{node="a"} 1\nray_af2_requests{node="b"} 2\n'
    )
