"""What a request may look like: every hostile input is a 4xx with a sentence that helps."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Callable
from typing import Any

import hostile
import numpy as np
import pytest
import serve_toy

from af2_ray.config import Serve
from af2_ray.engine.request import Clip, Request, RequestFailure
from af2_ray.text import Message
from serve_apps.clips import Clips, clip_key
from serve_apps.decode_process import Recording, read_recording
from serve_apps.fetch import Fetcher
from serve_apps.limits import Limits, failure_error
from serve_apps.schemas import ApiError, ChatRequest

LIMITS = Limits.of(Serve(max_body_mb=1, max_audio_s=20.0, max_new_tokens=64))


def take(body: bytes | dict[str, Any]) -> Request:
    """The whole way of a body, as the server goes it."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return all_of(raw)[0]


async def decode(data: bytes, name: str, left_s: float, truncate: bool, owner: bytes = b"") -> Recording:
    """A recording, decoded in this process."""
    return read_recording(data, name, left_s, truncate=truncate, limit_s=LIMITS.max_audio_s)


def clips_of(clips: Clips, files: list[bytes], **more: Any) -> tuple[list[Clip], bool]:
    return asyncio.run(clips.of(files, **more))


def all_of(raw: bytes) -> list[Request]:
    """The requests of all `n` answers."""
    chat = LIMITS.read(raw)
    clips, truncated = clips_of(Clips(decode, LIMITS.max_audio_s), files_of(chat), truncate=bool(chat.truncate_audio))
    return LIMITS.to_engine(chat, "id-1", clips, truncated=truncated)


def files_of(chat: ChatRequest) -> list[bytes]:
    """The recordings of a request, as the server gets them."""
    fetcher = Fetcher([], [], 2**20)
    return [asyncio.run(fetcher.read(audio, f"audio {n + 1}")) for n, audio in enumerate(chat.audios())]


def refused(body: bytes | dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        take(body)
    assert len(caught.value.message) < 300
    return caught.value


def with_raw(data: str, **part: Any) -> dict[str, Any]:
    body = serve_toy.chat(b"x")
    body["messages"][0]["content"][0]["input_audio"] = {"data": data, "format": "wav"} | part
    return body


def test_a_good_request() -> None:
    stereo = serve_toy.encoded(np.stack([np.sin(np.arange(96_000) / 20), np.zeros(96_000)], axis=1), 48_000)
    request = take(
        serve_toy.chat(
            serve_toy.wav(12.0), stereo, max_tokens=9, temperature=1, top_p=0.5, seed=3, stop="end", stream=True, n=1,
            user="somebody", metadata={"any": "thing"}, store=False, tools=None, response_format={"type": "text"},
        )
    )  # fmt: skip
    assert [clip.num_windows for clip in request.clips] == [2, 1]
    assert request.audio_s == pytest.approx(14.0)
    assert (request.max_new_tokens, request.temperature, request.top_p, request.seed) == (9, 1.0, 0.5, 3)
    assert (request.stop, request.prompt, request.id) == (("end",), "which sound is heard?", "id-1")


def test_defaults_are_greedy_and_within_the_limit() -> None:
    request = take({"model": "af2", "messages": [{"role": "user", "content": "  hello "}], "max_completion_tokens": 5})
    assert (request.temperature, request.max_new_tokens, request.clips, request.prompt) == (0.0, 5, (), "hello")
    assert take(serve_toy.chat()).max_new_tokens == 64


def test_several_answers_and_log_probabilities() -> None:
    asked = {"n": 3, "seed": 5, "temperature": 1, "logprobs": True, "top_logprobs": 2}
    requests = all_of(json.dumps(serve_toy.chat(serve_toy.wav(), **asked)).encode())
    assert [request.seed for request in requests] == [5, 6, 7]
    assert {request.top_logprobs for request in requests} == {2}
    assert len({request.clips for request in requests}) == 1
    assert take(serve_toy.chat()).top_logprobs is None


def test_audio_heard_before_is_not_decoded() -> None:
    decoded = []

    async def counted(data: bytes, name: str, left_s: float, truncate: bool, owner: bytes = b"") -> Recording:
        decoded.append(name)
        return await decode(data, name, left_s, truncate, owner)

    clips, audio = Clips(counted, 20.0), serve_toy.wav(12.0)
    (first,), _ = clips_of(clips, [audio], model="af2")
    clips.keep("af2", [first])
    (again,), _ = clips_of(clips, [audio], model="af2")
    assert again == first
    assert again.windows is None
    assert again.duration_s == first.duration_s == 12.0
    assert decoded == ["audio 1"]
    clips_of(clips, [audio], model="another")
    clips_of(clips, [audio], model="af2", anew=True)
    clips_of(clips, [audio], model="af2", salt=b"somebody else")
    clips.forget(first.key)
    clips_of(clips, [audio], model="af2")
    assert len(decoded) == 5


def test_a_recording_has_another_key_for_each_caller() -> None:
    keys = {clips_of(Clips(decode, 20.0), [serve_toy.wav()], salt=salt)[0][0].key for salt in (b"", b"a", b"b")}
    digest = hashlib.sha256(serve_toy.wav()).digest()
    assert keys == {clip_key(digest), clip_key(digest, b"a"), clip_key(digest, b"b")}
    assert clip_key(digest) == digest.hex()


def test_the_beginning_is_heard_where_that_is_asked_for() -> None:
    cut = take(serve_toy.chat(serve_toy.wav(30.0, rate=8_000), truncate_audio=True))
    assert (cut.audio_s, cut.truncated, cut.clips[0].num_windows) == (20.0, True, 2)
    whole = take(serve_toy.chat(serve_toy.wav(3.0), truncate_audio=True))
    assert (whole.audio_s, whole.truncated) == (3.0, False)
    (all_of_it,), _ = clips_of(Clips(decode, 30.0), [serve_toy.wav(30.0, rate=8_000)])
    assert cut.clips[0].key != all_of_it.key


def test_turns_are_messages_in_order() -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [serve_toy.audio_part(serve_toy.wav()), {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a bell"},
        {"role": "user", "content": "how often?"},
    ]
    request = take({"model": "af2", "messages": turns})
    assert request.prompt == "how often?"
    assert request.history == (
        Message("system", "be brief"),
        Message("user", "what?", 1),
        Message("assistant", "a bell"),
    )
    assert len(request.clips) == 1


def test_base64_with_line_breaks_or_a_data_prefix() -> None:
    text = base64.encodebytes(serve_toy.wav()).decode()
    assert take(with_raw(text)).audio_s == take(with_raw("data:audio/wav;base64," + text)).audio_s == 1.0


@pytest.mark.parametrize(("audio", "status", "words"), hostile.RECORDINGS)
def test_hostile_audio(audio: Callable[[], bytes], status: int, words: str) -> None:
    error = refused(serve_toy.chat(audio()))
    assert error.status == status
    assert words in error.message
    assert "audio 1" in error.message


def test_the_seconds_of_all_recordings_count_together() -> None:
    assert refused(serve_toy.chat(serve_toy.wav(11), serve_toy.wav(11, rate=8_000))).code == "audio_too_long"
    assert refused(serve_toy.chat(*[serve_toy.wav(0.1)] * 9)).code == "too_many_audios"


@pytest.mark.parametrize("data", ["AAA", "not base64!", "é" * 8, base64.b64encode(serve_toy.wav()).decode()[:-3]])
def test_broken_base64(data: str) -> None:
    error = refused(with_raw(data))
    assert (error.status, error.code) == (400, "invalid_base64")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 9}, "n: "),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "'tools' is not supported"),
        ({"response_format": {"type": "json_object"}}, "send {'type': 'text'}"),
        ({"modalities": ["text", "audio"]}, "'modalities' is not supported"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 65}, "this server's 64"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a"] * 5}, "4 stop strings"),
        ({"stop": ""}, "4 stop strings"),
        ({"stream": "yes"}, "stream"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": " "}]}, "the messages have no text"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'text', 'input_audio'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last message must be the user's"),
        ({"messages": [{"role": "user", "content": "hello <SEP> there"}]}, "reserves"),
        ({"messages": [{"role": "user", "content": "x" * 40_000}]}, "shorten it"),
    ],
)
def test_unusable_values(change: dict[str, Any], words: str) -> None:
    error = refused(serve_toy.chat() | change)
    assert error.status == 400
    assert words in error.message


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b'{"seed": ' + b"9" * 5000 + b"}",
        json.dumps(serve_toy.chat()).replace("heard", "\\ud800").encode(),
        json.dumps(serve_toy.chat()).replace("{", '{"temperature": NaN, ', 1).encode(),
    ],
)  # fmt: skip
def test_bodies_that_are_not_requests(body: bytes) -> None:
    assert refused(body).status == 400


def test_too_large_another_model_and_the_shape_of_errors() -> None:
    assert refused(b" " * (2**20 + 1)).status == 413
    error = refused(serve_toy.chat(model="gpt"))
    assert error.status == 404
    assert error.body() == {
        "error": {
            "message": "no model 'gpt' here; this server has 'af2'",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    assert failure_error(RequestFailure("too long", by_caller=True)).status == 400
    assert failure_error(RequestFailure("broken", by_caller=False)).body()["error"]["type"] == "server_error"
    assert ApiError(429, "later", code="busy", retry_after_s=5).body()["error"]["type"] == "rate_limit_error"
