"""From the bytes of a request to something the engine can answer, or an error that says what to mend.

Everything is checked before a request may share a batch with others: here its size, schema, model, lengths; the audio
itself in `decode_process`. What passes is small and harmless for the replica behind.
"""

from __future__ import annotations

import base64
import binascii
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

from af2_ray.config import Serve
from af2_ray.engine.request import Clip, Request, RequestFailure
from af2_ray.storage.places import shown
from af2_ray.text import EOS, SPECIAL_TOKENS
from serve_apps.schemas import (
    ApiError,
    ChatRequest,
    EmbeddingRequest,
    LabelRequest,
    RequestT,
    TextPart,
    bad_audio,
    parse_request,
)

MAX_AUDIOS = 8
MAX_TEXT_CHARS = 32_768
MAX_TEXTS_CHARS = 8 * MAX_TEXT_CHARS  # of one request for embeddings: 0.2 s of a tokenizer


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

    def read(self, body: bytes | bytearray) -> ChatRequest:
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
        check_text(request.text())
        self.check_count(len(request.audios()))
        return request

    def read_embedding(self, body: bytes | bytearray) -> EmbeddingRequest:
        """As `read`, of a request for vectors."""
        request = self._parsed(body, EmbeddingRequest, self.embedder_name)
        texts = [part.text for part in request.input if isinstance(part, TextPart)]
        self._check_texts(texts)
        self.check_count(len(request.input) - len(texts))
        return request

    def read_labels(self, body: bytes | bytearray) -> LabelRequest:
        """As `read`, of a request for labels."""
        request = self._parsed(body, LabelRequest, self.embedder_name)
        self._check_texts(request.texts())
        return request

    @property
    def embedder_name(self) -> str:
        """What the model behind embeddings is called."""
        return f"{self.model_name}-clap"

    def _parsed(self, body: bytes | bytearray, kind: type[RequestT], *names: str) -> RequestT:
        self.check_size(len(body))
        request = parse_request(body, kind)
        asked = getattr(request, "model")  # noqa: B009
        if asked not in names:
            message = f"no model {shown(asked)!r} here; this server has {', '.join(map(repr, names))}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return request

    @staticmethod
    def _check_texts(texts: Sequence[str]) -> None:
        if (total := sum(map(len, texts))) > MAX_TEXTS_CHARS:
            raise ApiError(
                400,
                f"the texts have {total} characters, more than {MAX_TEXTS_CHARS}: send fewer at a time",
                code="context_length_exceeded",
                param="input",
            )
        for text in texts:
            check_text(text)
            if not text.strip():
                raise ApiError(400, "a text is empty: leave it out", code="invalid_request", param="input")

    def check_count(self, num: int) -> None:
        """`ApiError` 413 if a request has too many recordings."""
        if num > MAX_AUDIOS:
            raise ApiError(413, f"{num} recordings in a request; send at most {MAX_AUDIOS}", code="too_many_audios")

    def to_engine(
        self, request: ChatRequest, request_id: str, clips: Sequence[Clip], *, truncated: bool = False, owner: str = ""
    ) -> list[Request]:
        """The engine's requests, one for each of the `n` answers asked for.

        Args:
            clips: the request's recordings, in order (`clips.Clips`).
            truncated: whether only the beginning of one is there.
            owner: name of whose API key asks, for a fair queue.
        """
        *history, last = request.conversation()
        one = Request(
            prompt=last.text,
            clips=tuple(clips),
            history=tuple(history),
            truncated=truncated,
            max_new_tokens=request.max_completion_tokens or request.max_tokens or self.max_new_tokens,
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=request.stops(),
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            id=request_id,
            owner=owner,
        )
        seeds = range(request.n or 1)  # answers of one request differ, and repeat with its seed
        return [replace(one, seed=None if one.seed is None else one.seed + number) for number in seeds]


def decode_base64(text: str, name: str) -> bytes:
    """Bytes of a base64 string, with or without line breaks or a `data:` prefix; `ApiError` 400 if it is none."""
    try:
        coded = text.encode("ascii")
        if coded.startswith(b"data:"):
            coded = coded.partition(b",")[2]
        data = base64.b64decode(coded.translate(None, string.whitespace.encode()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400,
            f"{name}: data is not base64 ({error}): send the whole file, base64-encoded",
            code="invalid_base64",
            param="messages",
        ) from error
    if not data:
        raise bad_audio(f"{name}: empty file; send a whole recording")
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
