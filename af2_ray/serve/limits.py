"""From the bytes of a request to something the engine can answer, or an error that says what to mend.

Everything is checked here, before a request may share a batch with others: size, schema, model, length, and the audio
itself (its header first: a small file can claim hours). What passes is small and harmless for the replica behind.
"""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from af2_ray.audio.decode import AudioError, decode_bytes
from af2_ray.audio.windows import SAMPLE_RATE, to_windows
from af2_ray.config import Serve
from af2_ray.serve.request import Failure, Request
from af2_ray.serve.schemas import ApiError, ChatRequest, InputAudio, parse_request
from af2_ray.text import EOS, SPECIAL_TOKENS

MAX_AUDIOS = 8
MAX_TEXT_CHARS = 32_768
RATES_HZ = (1_000, 384_000)
MAX_CHANNELS = 16


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    model_name: str
    max_body_bytes: int
    max_audio_s: float
    max_new_tokens: int

    @classmethod
    def of(cls, serve: Serve) -> Limits:
        """The limits a recipe's `serve` block sets."""
        return cls(serve.model_name, serve.max_body_mb * 2**20, serve.max_audio_s, serve.max_new_tokens)

    def check_size(self, num_bytes: int) -> None:
        """`ApiError` 413 if a body of `num_bytes` is too large."""
        if num_bytes > self.max_body_bytes:
            raise ApiError(
                413,
                f"the body is larger than {self.max_body_bytes // 2**20} MiB: send a shorter or a compressed recording",
                code="body_too_large",
            )

    def read(self, body: bytes) -> ChatRequest:
        """Parse and check all but the audio.

        Raises:
            ApiError: 413 too large, 400 not what the API takes, 404 another model.
        """
        self.check_size(len(body))
        request = parse_request(body)
        if request.model != self.model_name:
            raise ApiError(
                404,
                f"no model {request.model!r} here; this server has {self.model_name!r}",
                code="model_not_found",
                param="model",
            )
        wanted = request.max_completion_tokens or request.max_tokens
        if wanted and wanted > self.max_new_tokens:
            raise ApiError(
                400,
                f"max_tokens={wanted} is more than this server's {self.max_new_tokens}: ask for less or leave it out",
                code="max_tokens_too_large",
                param="max_tokens",
            )
        _check_text(request.prompt())
        return request

    def to_engine(self, request: ChatRequest, request_id: str) -> Request:
        """Decode the audio and make the engine's request.

        Raises:
            ApiError: 400 audio that cannot be used, 413 too many seconds of it.
        """
        audios = request.audios()
        if len(audios) > MAX_AUDIOS:
            raise ApiError(
                413, f"{len(audios)} recordings in a request; send at most {MAX_AUDIOS}", code="too_many_audios"
            )
        clips: list[NDArray[np.int16]] = []
        audio_s = 0.0
        for index, audio in enumerate(audios):
            mono = self._decode(audio, f"input_audio {index + 1}", self.max_audio_s - audio_s)
            audio_s += len(mono) / SAMPLE_RATE
            clips.append(to_windows(mono))
        return Request(
            prompt=request.prompt(),
            clips=tuple(clips),
            audio_s=audio_s,
            max_new_tokens=request.max_completion_tokens or request.max_tokens or self.max_new_tokens,
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=request.stops(),
            id=request_id,
        )

    def _decode(self, audio: InputAudio, name: str, left_s: float) -> NDArray[np.float32]:
        """Samples [T] at 16 kHz of one recording, at most `left_s` seconds."""
        data = decode_base64(audio.data, name)
        _check_header(data, name)
        try:
            return decode_bytes(data, name=name, max_duration_s=left_s)
        except AudioError as error:
            if error.reason == "too long":
                raise ApiError(
                    413,
                    f"{name}: the request has more than {self.max_audio_s:g} s of audio: send a shorter stretch",
                    code="audio_too_long",
                    param="messages",
                ) from error
            raise _bad_audio(str(error)) from error


def decode_base64(text: str, name: str) -> bytes:
    """Bytes of a base64 string, with or without line breaks or a `data:` prefix; `ApiError` 400 if it is none."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400,
            f"{name}: data is not base64 ({error}): send the whole file, base64-encoded",
            code="invalid_base64",
            param="messages",
        ) from error
    if not data:
        raise _bad_audio(f"{name}: empty file")
    return data


def failure_error(failure: Failure) -> ApiError:
    """The engine's refusal as an API error."""
    if failure.by_caller:
        return ApiError(400, failure.message, code="invalid_request", param="messages")
    return ApiError(500, failure.message, code="generation_failed")


def _check_text(prompt: str) -> None:
    if len(prompt) > MAX_TEXT_CHARS:
        raise ApiError(
            400,
            f"the text has {len(prompt)} characters, more than {MAX_TEXT_CHARS}: shorten it",
            code="context_length_exceeded",
            param="messages",
        )
    lowered = prompt.lower()
    for token in (*SPECIAL_TOKENS, EOS):
        if token.lower() in lowered:
            raise ApiError(
                400,
                f"the text contains {token!r}, which the model reserves: recordings go in input_audio parts",
                code="reserved_token",
                param="messages",
            )


def _check_header(data: bytes, name: str) -> None:
    """Refuse a file whose header alone shows that it is none, or absurd."""
    try:
        header = sf.info(io.BytesIO(data))
    except (sf.LibsndfileError, RuntimeError) as error:
        raise _bad_audio(f"{name}: not an audio file this server reads (wav, flac, ogg, mp3)") from error
    if not RATES_HZ[0] <= header.samplerate <= RATES_HZ[1]:
        raise _bad_audio(f"{name}: sample rate {header.samplerate} Hz; send {RATES_HZ[0]} to {RATES_HZ[1]} Hz")
    if header.channels > MAX_CHANNELS:
        raise _bad_audio(f"{name}: {header.channels} channels; send at most {MAX_CHANNELS}")


def _bad_audio(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_audio", param="messages")
