"""OpenAI's API in front of the model: reads and checks requests, decodes audio, passes questions on and answers back.

What is wrong with a request is found here, on CPUs, before it costs the model anything. A recording that the model has
heard before is known by its bytes: it is neither decoded nor sent again, unless the replica has forgotten it.
"""

# No `from __future__ import annotations`: FastAPI reads the handlers' annotations in the replica, where the names that
# only annotations use are not known any more (`af2` sends this module by value).

import asyncio
import logging
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import resources
from typing import TypeVar, cast

import numpy as np
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from af2_ray.config import Serve
from af2_ray.engine.request import Answer, Embedded, Event, Request, RequestFailure
from serve_apps.events import Chunks
from serve_apps.fetch import Fetcher
from serve_apps.keys import Keys
from serve_apps.limits import Limits, failure_error
from serve_apps.openapi import describe
from serve_apps.replies import (
    ChatCompletion,
    Choice,
    EmbeddingList,
    EmbeddingUsage,
    LabelList,
    LabelScore,
    Logprobs,
    ModelCard,
    ModelList,
    ReplyMessage,
    Usage,
)
from serve_apps.schemas import ApiError, ChatRequest, Content, TextPart, audio_of
from serve_apps.telemetry import scrape

logger = logging.getLogger("ray.serve")  # the one whose lines carry Serve's replica and request id

_BUSY_RETRY_S = 5
_HEARD = 4096  # recordings that are known by their bytes
_PAGE_POLICY = (  # the page needs nothing from anywhere else
    "default-src 'none'; connect-src 'self'; media-src blob:; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'"
)
ResultT = TypeVar("ResultT")

api = FastAPI(title="af2_ray", description="Questions of audio, answered by Audio Flamingo 2.")
api.openapi = partial(describe, api)  # type: ignore[method-assign]


class Ingress:
    """Passes checked questions to the model and answers back."""

    def __init__(
        self,
        model: DeploymentHandle,
        settings: Serve,
        clap: DeploymentHandle | None = None,
        keys: Sequence[bytes] = (),
    ) -> None:
        self._model, self._clap = model, clap
        self._limits = Limits.of(settings)
        self._fetcher = Fetcher.of(settings)
        self._keys = Keys.from_environment(settings.requests_per_minute, keys)
        self._timeout_s = settings.request_timeout_s
        self._page = (resources.files("serve_apps") / "page.html").read_text()
        embedders = [self._limits.embedder_name] if clap else []
        names = [self._limits.model_name, *self._limits.more_models, *embedders]
        self._cards = {name: ModelCard(id=name, created=int(time.time())) for name in names}
        self._heard: OrderedDict[tuple[str, str], float] = OrderedDict()  # seconds, by model and recording

    @api.get("/", include_in_schema=False)
    async def page(self) -> HTMLResponse:
        """A page to drop or record a clip on, and ask."""
        return HTMLResponse(self._page, headers={"content-security-policy": _PAGE_POLICY})

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        """Whether questions can be asked; Serve itself watches the model's replicas."""
        return {"status": "ok", "model": self._limits.model_name}

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics(self, http: HttpRequest) -> str:
        """Prometheus' text format, of all replicas on all nodes."""
        self._keys.check(http.headers.get("authorization"))
        return await scrape()

    @api.get("/v1/models")
    async def models(self, http: HttpRequest) -> ModelList:
        """The models, and the one that embeds if there is one."""
        self._keys.check(http.headers.get("authorization"))
        return ModelList(data=list(self._cards.values()))

    @api.get("/v1/models/{name}")
    async def model(self, name: str, http: HttpRequest) -> ModelCard:
        """One of them, by its name."""
        self._keys.check(http.headers.get("authorization"))
        if name not in self._cards:
            there = " and ".join(map(repr, self._cards))
            raise ApiError(404, f"no such model here; this server has {there}", code="model_not_found")
        return self._cards[name]

    @api.post("/v1/chat/completions", response_model=None)
    async def chat(self, http: HttpRequest) -> Response:
        """Answer a chat completion, whole or as server-sent events."""
        start, request_id = time.monotonic(), request_id_of(http)
        try:
            self._keys.take(http.headers.get("authorization"))
            chat = self._limits.read(await body_of(http, self._limits))
            files = [await self._fetcher.read(audio, f"audio {n + 1}") for n, audio in enumerate(chat.audios())]
            answer = self._streamed if chat.stream else self._whole
            response = await answer(chat, files, request_id, start)
        except ApiError as error:
            logger.info("request %s refused: %d %s", request_id, error.status, error.code)
            raise
        response.headers["x-request-id"] = request_id
        return response

    @api.post("/v1/embeddings")
    async def embeddings(self, http: HttpRequest) -> EmbeddingList:
        """Unit vectors of texts and recordings in one space."""
        self._keys.take(http.headers.get("authorization"))
        with about_input():
            request = self._limits.read_embedding(await body_of(http, self._limits))
            embedded, usage = await self._embedded(request.input, request_id_of(http))
        as_base64 = request.encoding_format == "base64"
        return EmbeddingList.of(embedded.vectors, as_base64=as_base64, model=request.model, usage=usage)

    @api.post("/v1/audio/labels")
    async def labels(self, http: HttpRequest) -> LabelList:
        """How well each label fits a recording, the best first: zero-shot, by AF-CLAP."""
        self._keys.take(http.headers.get("authorization"))
        with about_input():
            request = self._limits.read_labels(await body_of(http, self._limits))
            texts = [TextPart(type="text", text=text) for text in request.texts()]
            embedded, usage = await self._embedded([request.input, *texts], request_id_of(http))
        fit = embedded.scale * embedded.vectors[1:] @ embedded.vectors[0]
        scores = np.exp(fit - fit.max())
        ranked = sorted(zip((scores / scores.sum()).tolist(), request.candidate_labels, strict=True), reverse=True)
        data = [LabelScore(label=label, score=score) for score, label in ranked]
        return LabelList(data=data, model=request.model, usage=usage)

    async def _embedded(self, parts: Sequence[Content], request_id: str) -> tuple[Embedded, EmbeddingUsage]:
        """Vectors of parts, in order."""
        start = time.monotonic()
        clap = self._clap
        if clap is None:
            raise ApiError(
                404, "this server embeds nothing: start it with clap=FOLDER, an AF-CLAP export", code="model_not_found"
            )
        audios = [audio for part in parts if (audio := audio_of(part))]
        files = [await self._fetcher.read(audio, f"audio {n + 1}") for n, audio in enumerate(audios)]
        clips, _ = await asyncio.to_thread(self._limits.read_audios, files, {})
        left = iter(clips)
        items = [part.text if isinstance(part, TextPart) else next(left) for part in parts]

        async def ask() -> Embedded | RequestFailure:
            return await clap.embed.remote(items)

        result = await self._retried(ask)
        if isinstance(result, RequestFailure):
            raise failure_error(result)
        usage = EmbeddingUsage.of(result.prompt_tokens, sum(clip.duration_s for clip in clips))
        audio_s, took_s = usage.prompt_tokens_details.audio_seconds, time.monotonic() - start
        logger.info("request %s: embedded=%d audio_s=%.1f took_s=%.2f", request_id, len(parts), audio_s, took_s)
        return result, usage

    # --- Answers -------------------------------------------------------------------------------------------------

    async def _whole(self, chat: ChatRequest, files: list[bytes], request_id: str, start: float) -> Response:
        async def ask(requests: list[Request]) -> list[Answer | RequestFailure]:
            model = self._named(chat.model)
            return list(await asyncio.gather(*(model.answer.remote(request) for request in requests)))

        requests, results = await self._asked(chat, files, request_id, ask)
        answers = [result for result in results if isinstance(result, Answer)]
        if failure := next((result for result in results if isinstance(result, RequestFailure)), None):
            raise failure_error(failure)
        choices = [
            Choice(
                index=index,
                message=ReplyMessage(content=answer.text),
                logprobs=Logprobs.of(answer.logprobs),
                finish_reason=answer.finish_reason,
            )
            for index, answer in enumerate(answers)
        ]
        completion = ChatCompletion(
            id=f"chatcmpl-{request_id}",
            model=chat.model,
            choices=choices,
            usage=usage_of(requests[0], answers),
            truncated=requests[0].truncated,
        )
        self._tell(request_id, requests[0], answers, start)
        return JSONResponse(completion.model_dump(exclude=None if requests[0].truncated else {"truncated"}))

    async def _streamed(self, chat: ChatRequest, files: list[bytes], request_id: str, start: float) -> Response:
        """Wait for the first piece, while an error can still be a status and another replica can still be asked."""

        async def ask(requests: list[Request]) -> list[tuple[AsyncIterator[Event], Event]]:
            model = self._named(chat.model).options(stream=True)
            streams = [model.stream.remote(request) for request in requests]
            firsts = await asyncio.gather(*(anext(stream) for stream in streams))
            return list(zip(cast(list[AsyncIterator[Event]], streams), firsts, strict=True))

        requests, begun = await self._asked(chat, files, request_id, ask)
        if failure := next((first for _, first in begun if isinstance(first, RequestFailure)), None):
            raise failure_error(failure)

        async def events() -> AsyncIterator[str]:
            chunks = Chunks(f"chatcmpl-{request_id}", chat)
            answers: list[Answer] = []
            async for chunk in chunks.of(begun, answers):
                yield chunk
            if len(answers) == len(begun):
                for chunk in chunks.end(usage_of(requests[0], answers)):
                    yield chunk
            self._tell(request_id, requests[0], answers, start)

        return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def _asked(
        self,
        chat: ChatRequest,
        files: list[bytes],
        request_id: str,
        ask: Callable[[list[Request]], Awaitable[list[ResultT]]],
    ) -> tuple[list[Request], list[ResultT]]:
        """Ask the model: recordings it has heard go by their keys, and once more whole if it has forgotten them."""
        heard = {key: seconds for (model, key), seconds in self._heard.items() if model == chat.model}
        for _ in range(2):
            requests = await asyncio.to_thread(self._limits.to_engine, chat, request_id, files, heard)
            results = await self._retried(lambda requests=requests: ask(requests))  # type: ignore[misc]
            firsts = [result[1] if isinstance(result, tuple) else result for result in results]
            if not any(isinstance(first, RequestFailure) and first.missing for first in firsts):
                break
            heard = {}
        for clip in requests[0].clips:
            self._heard[chat.model, clip.key] = clip.duration_s
            self._heard.move_to_end((chat.model, clip.key))
        while len(self._heard) > _HEARD:
            self._heard.popitem(last=False)
        return requests, results

    def _named(self, name: str) -> DeploymentHandle:
        """The model's replicas, those first that have this one of its models loaded."""
        return self._model if name == self._limits.model_name else self._model.options(multiplexed_model_id=name)

    async def _retried(self, ask: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Ask, once more if the replica died under it; time and pressure become API errors."""
        try:
            async with asyncio.timeout(self._timeout_s):
                try:
                    return await ask()
                except RayActorError:
                    logger.warning("a replica died, asking another")
                    return await ask()
        except TimeoutError as error:
            message = f"no answer within {self._timeout_s:g} s: send less audio or ask for fewer tokens"
            raise ApiError(408, message, code="timeout") from error
        except BackPressureError as error:
            message = f"too many questions at once: try again in {_BUSY_RETRY_S} s"
            raise ApiError(429, message, code="busy", retry_after_s=_BUSY_RETRY_S) from error
        except (RayActorError, DeploymentUnavailableError) as error:
            raise ApiError(
                503, "the model is restarting: try again", code="unavailable", retry_after_s=_BUSY_RETRY_S
            ) from error

    def _tell(self, request_id: str, request: Request, answers: list[Answer], start: float) -> None:
        tokens = sum(answer.completion_tokens for answer in answers)
        encoded = max((answer.encoded_windows for answer in answers), default=0)
        took_s, audio_s = time.monotonic() - start, request.audio_s
        line = "request %s: audio_s=%.1f encoded_windows=%d tokens=%d took_s=%.2f"
        logger.info(line, request_id, audio_s, encoded, tokens, took_s)


@api.exception_handler(ApiError)
async def _api_error(_: HttpRequest, error: ApiError) -> JSONResponse:
    headers = {"retry-after": str(error.retry_after_s)} if error.retry_after_s else None
    return JSONResponse(error.body(), error.status, headers)


@api.exception_handler(HTTPException)
async def _http_error(_: HttpRequest, error: HTTPException) -> JSONResponse:
    shaped = ApiError(error.status_code, str(error.detail), code="http_error")
    return JSONResponse(shaped.body(), error.status_code, error.headers)


@api.exception_handler(Exception)
async def _server_error(_: HttpRequest, error: Exception) -> JSONResponse:
    logger.error("a request failed", exc_info=error)
    return JSONResponse(ApiError(500, "the server failed; its log has the reason", code="internal").body(), 500)


async def body_of(http: HttpRequest, limits: Limits) -> bytes:
    """The body, given up as soon as it is seen to be too large."""
    stated = http.headers.get("content-length", "0")
    limits.check_size(int(stated) if stated.isdecimal() and len(stated) < 20 else 0)
    body = bytearray()
    async for chunk in http.stream():
        limits.check_size(len(body) + len(chunk))
        body += chunk
    return bytes(body)


@contextmanager
def about_input() -> Iterator[None]:
    """Within the block, what is wrong with a text or a recording is so with `input`, not with a chat's `messages`."""
    try:
        yield
    except ApiError as error:
        if error.param == "messages":
            error.param = "input"
        raise


def request_id_of(http: HttpRequest) -> str:
    """`x-request-id` as the caller or Serve's proxy set it, if it is a plain word; else one of our own."""
    given = http.headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w-]{1,64}", given, re.ASCII) else uuid.uuid4().hex


def usage_of(request: Request, answers: list[Answer]) -> Usage:
    """The prompt once, the tokens of all answers."""
    tokens = sum(answer.completion_tokens for answer in answers)
    return Usage.of(answers[0].prompt_tokens, tokens, request.audio_s)
