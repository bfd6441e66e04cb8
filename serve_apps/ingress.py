"""OpenAI's API in front of the model: reads and checks requests, decodes audio, passes questions on and answers back.

What is wrong with a request is found here, on CPUs, before it costs the model anything. A recording that the model has
heard before is known by its bytes: it is neither decoded nor sent again, unless the replica has forgotten it. One
deadline holds for all that happens to a request until its answer begins: its body's fetching, decoding and waiting too.
"""

# No `from __future__ import annotations`: FastAPI reads the handlers' annotations in the replica, where the names that
# only annotations use are not known any more (`af2` sends this module by value).

import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from importlib import resources
from typing import cast

import numpy as np
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from af2_ray.config import Serve
from af2_ray.engine.request import Answer, Clip, Embedded, Event, Request, RequestFailure
from serve_apps.admission import BUSY_RETRY_S, COPIES, AskedT, Memory, Places, Visit, visiting, while_there
from serve_apps.asking import Asking, ResultT, fingerprint_of, together
from serve_apps.clips import Clips, clip_key
from serve_apps.decode_pool import DecodePool
from serve_apps.events import Chunks, EventStream, Stream
from serve_apps.fetch import Fetcher
from serve_apps.keys import ANYONE, Keys, KeySource, check_open
from serve_apps.limits import Limits, failure_error
from serve_apps.openapi import describe
from serve_apps.replies import (
    ChatCompletion,
    Choice,
    DeletedAudio,
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

_PAGE_POLICY = (  # the page needs nothing from anywhere else
    "default-src 'none'; connect-src 'self'; media-src blob:; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'"
)

api = FastAPI(title="af2_ray", description="Questions of audio, answered by Audio Flamingo 2.")
api.openapi = partial(describe, api)  # type: ignore[method-assign]


class Ingress:
    """Passes checked questions to the model and answers back."""

    def __init__(
        self,
        model: DeploymentHandle,
        settings: Serve,
        clap: DeploymentHandle | None = None,
        keys: KeySource | None = None,
    ) -> None:
        self._model, self._clap, self._settings = model, clap, settings
        self._limits = Limits.of(settings)
        self._fetcher = Fetcher.of(settings)
        self._keys = Keys([keys or KeySource(), KeySource.of_environment()], settings.requests_per_minute)
        check_open(self._keys, is_meant=settings.open)
        self._decoders = DecodePool(settings.decoders, settings.decoder_memory_mb, settings.max_audio_s)
        self._clips = Clips(self._decoders.read, settings.max_audio_s)
        least = COPIES * settings.max_body_mb * 2**20
        limit = max(settings.ingress_memory_mb * 2**20, least)
        self._memory = Memory(limit, max(limit // 2, least))  # half of it for one key
        self._places = Places(2 * settings.num_slots)  # half of what a replica takes: another key finds room
        self._replicas = Asking()
        self._page = (resources.files("serve_apps") / "page.html").read_text()
        embedders = [self._limits.embedder_name] if clap else []
        names = [self._limits.model_name, *self._limits.more_models, *embedders]
        self._cards = {name: ModelCard(id=name, created=int(time.time())) for name in names}

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
        async with self._visit(http, self._limits.read) as visit:
            num = visit.asked.n or 1
            self._keys.count(visit.owner, num - 1)
            await visit.held.enter_async_context(self._places.taking(visit.owner.hex(), num))
            files = await self._fetcher.read_all(visit.asked.audios(), visit.hold)
            if visit.asked.stream:
                return await self._streamed(visit, files, http)
            return await self._whole(visit, files)

    @api.post("/v1/embeddings")
    async def embeddings(self, http: HttpRequest) -> EmbeddingList:
        """Unit vectors of texts and recordings in one space."""
        with about_input():
            async with self._visit(http, self._limits.read_embedding) as visit:
                embedded, usage = await self._embedded(visit, visit.asked.input)
        as_base64, model = visit.asked.encoding_format == "base64", visit.asked.model
        return EmbeddingList.of(embedded.vectors, as_base64=as_base64, model=model, usage=usage)

    @api.post("/v1/audio/labels")
    async def labels(self, http: HttpRequest) -> LabelList:
        """How well each label fits a recording, the best first: zero-shot, by AF-CLAP."""
        with about_input():
            async with self._visit(http, self._limits.read_labels) as visit:
                texts = [TextPart(type="text", text=text) for text in visit.asked.texts()]
                embedded, usage = await self._embedded(visit, [visit.asked.input, *texts])
        fit = embedded.scale * embedded.vectors[1:] @ embedded.vectors[0]
        scores = np.exp(fit - fit.max())
        ranked = sorted(zip((scores / scores.sum()).tolist(), visit.asked.candidate_labels, strict=True), reverse=True)
        data = [LabelScore(label=label, score=score) for score, label in ranked]
        return LabelList(data=data, model=visit.asked.model, usage=usage)

    @api.delete("/v1/audio/{sha256}")
    async def forget(self, sha256: str, http: HttpRequest) -> DeletedAudio:
        """Forget a recording, by the SHA-256 of its file: what the model's replicas keep of it, for this API key."""
        owner = self._keys.take(http.headers.get("authorization"))
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ApiError(400, "name a recording by the SHA-256 of its file: 64 of 0-9a-f", code="invalid_request")
        key = clip_key(bytes.fromhex(sha256), self._salt(owner))
        self._clips.forget(key)
        try:
            await self._model.broadcast("forget", [key]).results_async(timeout_s=self._settings.request_timeout_s)
        except DeploymentUnavailableError:
            pass  # no replica, so nothing that it could keep
        except (RayActorError, TimeoutError) as error:
            message = "not all replicas have answered whether they keep it: try again"
            raise ApiError(503, message, code="unavailable", retry_after_s=BUSY_RETRY_S) from error
        return DeletedAudio(id=sha256)

    # --- On the way ----------------------------------------------------------------------------------------------

    def _visit(
        self, http: HttpRequest, parse: Callable[[bytearray], AskedT]
    ) -> AbstractAsyncContextManager[Visit[AskedT]]:
        settings = self._settings
        return visiting(
            http,
            parse,
            lambda: self._keys.take(http.headers.get("authorization")),
            self._memory,
            self._limits.check_size,
            body_s=settings.body_timeout_s,
            limit_s=settings.request_timeout_s,
        )

    def _salt(self, owner: bytes) -> bytes:
        return b"" if self._settings.share_audio else owner

    async def _embedded(self, visit: Visit[AskedT], parts: Sequence[Content]) -> tuple[Embedded, EmbeddingUsage]:
        """Vectors of parts, in order."""
        clap = self._clap
        if clap is None:
            raise ApiError(
                404, "this server embeds nothing: start it with clap=FOLDER, an AF-CLAP export", code="model_not_found"
            )
        await visit.held.enter_async_context(self._places.taking(visit.owner.hex(), 1))
        audios = [audio for part in parts if (audio := audio_of(part))]
        clips, _ = await self._clips.of(await self._fetcher.read_all(audios, visit.hold), owner=visit.owner)
        hold_windows(visit, clips)
        left = iter(clips)
        items = [part.text if isinstance(part, TextPart) else next(left) for part in parts]

        async def ask() -> Embedded | RequestFailure:
            return await clap.embed.remote(items)

        result = await self._replicas.retried(ask, fingerprint_of(items, visit.owner))
        if isinstance(result, RequestFailure):
            raise failure_error(result)
        usage = EmbeddingUsage.of(result.prompt_tokens, sum(clip.duration_s for clip in clips))
        audio_s, took_s = usage.prompt_tokens_details.audio_seconds, time.monotonic() - visit.start
        logger.info("request %s: embedded=%d audio_s=%.1f took_s=%.2f", visit.id, len(parts), audio_s, took_s)
        return result, usage

    # --- Answers -------------------------------------------------------------------------------------------------

    async def _whole(self, visit: Visit[ChatRequest], files: list[bytes]) -> Response:
        async def ask(requests: list[Request]) -> list[Answer | RequestFailure]:
            model = self._named(visit.asked.model)
            return await together([model.answer.remote(request) for request in requests])

        requests, results = await self._asked(visit, files, ask)
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
            id=f"chatcmpl-{visit.id}",
            model=visit.asked.model,
            choices=choices,
            usage=usage_of(requests[0], answers),
            truncated=requests[0].truncated,
        )
        self._log(visit, requests[0], answers)
        return JSONResponse(completion.model_dump(exclude=None if requests[0].truncated else {"truncated"}))

    async def _streamed(self, visit: Visit[ChatRequest], files: list[bytes], http: HttpRequest) -> Response:
        """Wait for the first piece, while an error can still be a status and another replica can still be asked."""

        async def ask(requests: list[Request]) -> list[tuple[Stream, Event]]:
            model = self._named(visit.asked.model).options(stream=True)
            streams = [cast(Stream, model.stream.remote(request)) for request in requests]
            return list(zip(streams, await together(streams, anext), strict=True))

        requests, begun = await self._asked(visit, files, ask)
        if failure := next((first for _, first in begun if isinstance(first, RequestFailure)), None):
            for stream, _ in begun:
                stream.cancel()
            raise failure_error(failure)
        answers: list[Answer] = []

        async def events() -> AsyncIterator[str]:
            chunks = Chunks(f"chatcmpl-{visit.id}", visit.asked)
            async with while_there(http):
                async for chunk in chunks.of(begun, answers):
                    yield chunk
                if len(answers) == len(begun):
                    for chunk in chunks.end(usage_of(requests[0], answers)):
                        yield chunk
            if isinstance(chunks.error, RayActorError):
                self._replicas.note_death(fingerprint_of(asked_of(requests[0]), visit.owner))

        def end() -> None:
            for stream, _ in begun:
                stream.cancel()
            self._log(visit, requests[0], answers)

        held = visit.held.pop_all()
        held.callback(end)
        return EventStream(events(), held)

    async def _asked(
        self,
        visit: Visit[ChatRequest],
        files: list[bytes],
        ask: Callable[[list[Request]], Awaitable[list[ResultT]]],
    ) -> tuple[list[Request], list[ResultT]]:
        """Ask the model: recordings it has heard go by their keys, and once more whole if it has forgotten them."""
        chat, salt = visit.asked, self._salt(visit.owner)
        owner = "" if visit.owner == ANYONE else visit.owner.hex()
        for anew in (False, True):
            clips, truncated = await self._clips.of(
                files, model=chat.model, salt=salt, owner=visit.owner, truncate=bool(chat.truncate_audio), anew=anew
            )
            requests = self._limits.to_engine(chat, visit.id, clips, truncated=truncated, owner=owner)
            hold_windows(visit, clips, len(requests))
            fingerprint = fingerprint_of(asked_of(requests[0]), visit.owner)
            results = await self._replicas.retried(lambda requests=requests: ask(requests), fingerprint)  # type: ignore[misc]
            firsts = [result[1] if isinstance(result, tuple) else result for result in results]
            if not any(isinstance(first, RequestFailure) and first.missing for first in firsts):
                break
            for result in results:
                if isinstance(result, tuple):
                    result[0].cancel()
        self._clips.keep(chat.model, requests[0].clips)
        return requests, results

    def _named(self, name: str) -> DeploymentHandle:
        """The model's replicas, those first that have this one of its models loaded."""
        return self._model if name == self._limits.model_name else self._model.options(multiplexed_model_id=name)

    def _log(self, visit: Visit[ChatRequest], request: Request, answers: list[Answer]) -> None:
        tokens = sum(answer.completion_tokens for answer in answers)
        encoded = max((answer.encoded_windows for answer in answers), default=0)
        took_s, audio_s = time.monotonic() - visit.start, request.audio_s
        line = "request %s: audio_s=%.1f encoded_windows=%d tokens=%d took_s=%.2f"
        logger.info(line, visit.id, audio_s, encoded, tokens, took_s)


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


def hold_windows(visit: Visit[AskedT], clips: Sequence[Clip], times: int = 1) -> None:
    """Take memory for what is sent to replicas, so many times."""
    visit.hold(times * sum(clip.windows.nbytes for clip in clips if clip.windows is not None))


@contextmanager
def about_input() -> Iterator[None]:
    """Within the block, what is wrong with a text or a recording is so with `input`, not with a chat's `messages`."""
    try:
        yield
    except ApiError as error:
        if error.param == "messages":
            error.param = "input"
        raise


def asked_of(request: Request) -> list[str | Clip]:
    """The texts and recordings of a request, which name it (`asking.fingerprint_of`)."""
    before = [f"{message.role}: {message.text}" for message in request.history]
    return [*before, request.prompt, *request.clips]


def usage_of(request: Request, answers: list[Answer]) -> Usage:
    """The prompt once, the tokens of all answers."""
    tokens = sum(answer.completion_tokens for answer in answers)
    return Usage.of(answers[0].prompt_tokens, tokens, request.audio_s)
