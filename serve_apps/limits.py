"""From the bytes of a request to something the engine can answer, or an error that says what to mend.

Everything is checked here, before a request may share a batch with others: size, schema, model, length, and the audio
itself (its header first: a small file can claim hours). What passes is small and harmless for the replica behind.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from af2_ray.audio.decode import AudioError, decode_bytes
from af2_ray.audio.windows import SAMPLE_RATE, num_windows_for, to_windows
from af2_ray.config import Serve
from af2_ray.engine.request import Clip, Request, RequestFailure
from af2_ray.text import EOS, SPECIAL_TOKENS
from serve_apps.schemas import (
    ApiError,
    ChatRequest,
    EmbeddingRequest,
    LabelRequest,
    RequestT,
    TextPart,
    parse_request,
)

MAX_AUDIOS = 8
MAX_TEXT_CHARS = 32_768
RATES_HZ = (1_000, 192_000)
MAX_CHANNELS = 8


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    model_name: str
    max_body_bytes: int
    max_audio_s: float
    max_new_tokens: int
    more_models: tuple[str, ...] = ()

    @classmethod
    def of(cls, serve: Serve) -> Limits:
        """The limits a recipe's `serve` block sets."""
        return cls(
            *(serve.model_name, serve.max_body_mb * 2**20, serve.max_audio_s, serve.max_new_tokens),
            more_models=tuple(serve.more_models),
        )

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
        request = self._parsed(body, ChatRequest, self.model_name, *self.more_models)
        wanted = request.max_completion_tokens or request.max_tokens
        if wanted and wanted > self.max_new_tokens:
            raise ApiError(
                400,
                f"max_tokens={wanted} is more than this server's {self.max_new_tokens}: ask for less or leave it out",
                code="max_tokens_too_large",
                param="max_tokens",
            )
        check_text(request.prompt())
        self.check_count(len(request.audios()))
        return request

    def read_embedding(self, body: bytes) -> EmbeddingRequest:
        """As `read`, of a request for vectors."""
        request = self._parsed(body, EmbeddingRequest, self.embedder_name)
        texts = [part.text for part in request.input if isinstance(part, TextPart)]
        self._check_texts(texts)
        self.check_count(len(request.input) - len(texts))
        return request

    def read_labels(self, body: bytes) -> LabelRequest:
        """As `read`, of a request for labels."""
        request = self._parsed(body, LabelRequest, self.embedder_name)
        self._check_texts(request.texts())
        return request

    @property
    def embedder_name(self) -> str:
        """What the model behind embeddings is called."""
        return f"{self.model_name}-clap"

    def _parsed(self, body: bytes, kind: type[RequestT], *names: str) -> RequestT:
        self.check_size(len(body))
        request = parse_request(body, kind)
        asked = getattr(request, "model")  # noqa: B009
        if asked not in names:
            message = f"no model {asked!r} here; this server has {', '.join(map(repr, names))}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return request

    @staticmethod
    def _check_texts(texts: Sequence[str]) -> None:
        for text in texts:
            check_text(text)
            if not text.strip():
                raise ApiError(400, "a text is empty: leave it out", code="invalid_request", param="input")

    def check_count(self, num: int) -> None:
        """`ApiError` 413 if a request has too many recordings."""
        if num > MAX_AUDIOS:
            raise ApiError(413, f"{num} recordings in a request; send at most {MAX_AUDIOS}", code="too_many_audios")

    def to_engine(
        self, request: ChatRequest, request_id: str, files: Sequence[bytes], heard: Mapping[str, float] | None = None
    ) -> list[Request]:
        """Decode the audio and make the engine's requests, one for each of the `n` answers asked for.

        Args:
            files: the recordings' bytes, in order.
            heard: seconds of recordings, by key, that the engine has heard already: these are not decoded again.

        Raises:
            ApiError: 400 audio that cannot be used, 413 too many seconds of it.
        """
        clips, truncated = self.read_audios(files, heard or {}, truncate=bool(request.truncate_audio))
        one = Request(
            prompt=request.prompt(),
            clips=tuple(clips),
            truncated=truncated,
            max_new_tokens=request.max_completion_tokens or request.max_tokens or self.max_new_tokens,
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=request.stops(),
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            id=request_id,
        )
        seeds = range(request.n or 1)  # answers of one request differ, and repeat with its seed
        return [replace(one, seed=None if one.seed is None else one.seed + number) for number in seeds]

    def read_audios(
        self, files: Sequence[bytes], heard: Mapping[str, float], *, truncate: bool = False
    ) -> tuple[list[Clip], bool]:
        """`read_audio` of a request's recordings, which share its seconds; whether any was cut."""
        clips: list[Clip] = []
        truncated = False
        for index, data in enumerate(files):
            left_s = self.max_audio_s - sum(clip.duration_s for clip in clips)
            clip, is_cut = self.read_audio(data, f"audio {index + 1}", left_s, heard, truncate=truncate)
            truncated |= is_cut
            clips.append(clip)
        return clips, truncated

    def read_audio(
        self, data: bytes, name: str, left_s: float, heard: Mapping[str, float], *, truncate: bool = False
    ) -> tuple[Clip, bool]:
        """Check and decode a recording of at most `left_s` seconds (or else, its beginning), and whether it was cut.

        One heard before is known by its bytes alone.
        """
        key = hashlib.sha256(data).hexdigest()
        if heard.get(key, left_s + 1) <= left_s:
            return Clip(key, num_windows_for(heard[key]), None, heard[key]), False
        _check_header(data, name)
        cut = False
        try:
            mono = decode_bytes(data, name=name, max_duration_s=left_s)
        except AudioError as error:
            if error.reason != "too long":
                raise _bad_audio(str(error)) from error
            if not truncate or left_s < 1:
                raise ApiError(
                    413,
                    f"{name}: the request has more than {self.max_audio_s:g} s of audio: send a shorter stretch, or "
                    "truncate_audio: true to have its beginning heard",
                    code="audio_too_long",
                    param="messages",
                ) from error
            mono, cut, key = _beginning(data, name, left_s), True, f"{key}:{left_s:g}"
        return Clip.of(to_windows(mono), key, len(mono) / SAMPLE_RATE), cut


def _beginning(data: bytes, name: str, duration_s: float) -> NDArray[np.float32]:
    try:
        return decode_bytes(data, 0.0, duration_s, name=name)
    except AudioError as error:
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
        raise _bad_audio(f"{name}: empty file; send a whole recording")
    return data


def failure_error(failure: RequestFailure) -> ApiError:
    """The engine's refusal as an API error."""
    if failure.by_caller:
        return ApiError(400, failure.message, code="invalid_request", param="messages")
    return ApiError(500, failure.message, code="generation_failed")


def check_text(prompt: str) -> None:
    """`ApiError` 400 for a text that is too long or has the model's own tokens in it."""
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
                f"the text contains {token!r}, which the model reserves: send recordings as input_audio parts",
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
