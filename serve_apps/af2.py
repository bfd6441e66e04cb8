"""The model behind OpenAI's chat completions, on Ray Serve.

    serve run serve_apps.af2:app model=runs/demo/model recipe=tiny
    curl localhost:8000/v1/models

Two deployments, so that each scales on its own: the ingress checks requests and decodes audio on CPUs and never loads
the model; the model answers whole batches. What is wrong with a request is found in the ingress, because a bad item
inside a batch would cost its neighbours. Streamed answers are not batched (one generation runs at a time).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import ray
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from af2_ray.config import Serve, load_recipe
from af2_ray.serve.limits import Limits, failure_error
from af2_ray.serve.request import Answer, Failure, Request
from af2_ray.serve.schemas import (
    ApiError,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    ModelCard,
    ModelList,
    ReplyMessage,
    Usage,
)

logger = logging.getLogger("ray.serve")  # the one whose lines carry Serve's replica and request id

APP_NAME = "af2"
_BUSY_RETRY_S = 5
_INGRESS_REQUESTS = 64  # a replica of the ingress holds this many bodies at most

# --- The model ---------------------------------------------------------------------------------------------------


class Model:
    """One replica: an engine, and the batches it is given."""

    def __init__(self, folder: str, settings: Serve) -> None:
        from af2_ray.serve.engine import Engine  # loads torch, which the ingress does without

        library = logging.getLogger("af2_ray")
        library.handlers, library.level = logger.handlers, logging.INFO
        self._engine = Engine.from_pretrained(folder, max_time_s=settings.request_timeout_s)
        self._stall_s = 3 * settings.request_timeout_s
        self._batch.set_max_batch_size(settings.max_batch_size)
        self._batch.set_batch_wait_timeout_s(settings.batch_wait_s)

    @serve.batch
    async def _batch(self, requests: list[Request]) -> list[Answer | Failure]:
        start = time.monotonic()
        results = await asyncio.to_thread(self._engine.answer, requests)
        ids = " ".join(request.id for request in requests)
        logger.info("batch of %d in %.2f s: %s", len(requests), time.monotonic() - start, ids)
        return results

    async def answer(self, request: Request) -> Answer | Failure:
        """Answer one request, in a batch with those that came about when it did."""
        return cast("Answer | Failure", await self._batch(request))

    async def stream(self, request: Request) -> AsyncIterator[str | Answer | Failure]:
        """Pieces of the answer, then the whole; ends its generation when the caller goes."""
        cancelled = threading.Event()
        pieces = self._engine.stream(request, cancelled)
        try:
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield piece
        finally:
            cancelled.set()

    def check_health(self) -> None:
        """Called by Serve: a generation far beyond its time limit is a replica to be replaced."""
        if (busy_s := self._engine.busy_s()) > self._stall_s:
            raise RuntimeError(f"the engine has been in one batch for {busy_s:.0f} s")


# --- HTTP --------------------------------------------------------------------------------------------------------

api = FastAPI(title="af2_ray", description="Questions of audio, answered by Audio Flamingo 2.")


class Ingress:
    """Reads, checks and decodes requests; passes questions to the model and answers back."""

    def __init__(self, model: DeploymentHandle, settings: Serve) -> None:
        self._model = model
        self._limits = Limits.of(settings)
        self._timeout_s = settings.request_timeout_s
        self._card = ModelCard(id=settings.model_name, created=int(time.time()))

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        """Whether questions can be asked; Serve itself watches the model's replicas."""
        return {"status": "ok", "model": self._card.id}

    @api.get("/v1/models")
    async def models(self) -> ModelList:
        """The one model there is."""
        return ModelList(data=[self._card])

    @api.get("/v1/models/{name}")
    async def model(self, name: str) -> ModelCard:
        """That model, by its name."""
        if name != self._card.id:
            raise ApiError(404, f"no model {name!r} here; this server has {self._card.id!r}", code="model_not_found")
        return self._card

    @api.post("/v1/chat/completions", response_model=None)
    async def chat(self, http: HttpRequest) -> Response:
        """Answer a chat completion, whole or as server-sent events."""
        start = time.monotonic()
        request_id = _request_id(http)
        try:
            chat = self._limits.read(await _body(http, self._limits))
            request = await asyncio.to_thread(self._limits.to_engine, chat, request_id)
            if chat.stream:
                response = await self._stream(chat, request)
            else:
                response = await self._whole(chat, request)
        except ApiError as error:
            logger.info("refused: %d %s", error.status, error.code)
            raise
        logger.info("audio_s=%.1f took_s=%.2f", request.audio_s, time.monotonic() - start)
        return response  # Serve's proxy adds `x-request-id`

    async def _whole(self, chat: ChatRequest, request: Request) -> Response:
        result = await self._retried(self._answer, request)
        if isinstance(result, Failure):
            raise failure_error(result)
        message = ReplyMessage(content=result.text)
        completion = ChatCompletion(
            id=f"chatcmpl-{request.id}",
            model=chat.model,
            choices=[Choice(message=message, finish_reason=result.finish_reason)],
            usage=Usage.of(result.prompt_tokens, result.completion_tokens, request.audio_s),
        )
        return JSONResponse(completion.model_dump())

    async def _stream(self, chat: ChatRequest, request: Request) -> Response:
        """Wait for the first piece, while an error can still be a status and another replica can still be asked."""
        pieces, first = await self._retried(self._first, request)
        if isinstance(first, Failure):
            raise failure_error(first)
        events = self._events(chat, request, first, pieces)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def _answer(self, request: Request) -> Answer | Failure:
        return cast("Answer | Failure", await self._model.answer.remote(request))

    async def _first(self, request: Request) -> tuple[AsyncIterator[Any], str | Answer | Failure]:
        pieces = cast("AsyncIterator[Any]", self._model.options(stream=True).stream.remote(request))
        return pieces, await anext(pieces)

    async def _retried(self, ask: Any, request: Request) -> Any:
        """Ask, once more if the replica died under it; time and pressure become API errors."""
        try:
            async with asyncio.timeout(self._timeout_s):
                try:
                    return await ask(request)
                except RayActorError:
                    logger.warning("%s: its replica died, asking another", request.id)
                    return await ask(request)
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

    async def _events(
        self, chat: ChatRequest, request: Request, first: str | Answer, pieces: AsyncIterator[Any]
    ) -> AsyncIterator[str]:
        """Server-sent events: the role, the pieces, why it ended, the usage if asked for, `[DONE]`."""
        created = int(time.time())

        def event(choices: list[ChunkChoice], usage: Usage | None = None) -> str:
            chunk = ChatChunk(
                id=f"chatcmpl-{request.id}", created=created, model=chat.model, choices=choices, usage=usage
            )
            return chunk.event()

        yield event([ChunkChoice(delta=Delta(role="assistant", content=""))])
        piece: str | Answer | Failure = first
        try:
            while isinstance(piece, str):
                yield event([ChunkChoice(delta=Delta(content=piece))])
                piece = await anext(pieces)
            if isinstance(piece, Failure):
                raise failure_error(piece)
        except (ApiError, RayActorError, StopAsyncIteration) as error:
            logger.warning("%s ended in the middle: %r", request.id, error)
            broken = ApiError(500, "the answer broke off: ask again", code="generation_failed")
            yield f"data: {json.dumps(broken.body())}\n\n"
            return
        yield event([ChunkChoice(delta=Delta(), finish_reason=piece.finish_reason)])
        if chat.stream_options and chat.stream_options.include_usage:
            yield event([], Usage.of(piece.prompt_tokens, piece.completion_tokens, request.audio_s))
        yield "data: [DONE]\n\n"


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


async def _body(http: HttpRequest, limits: Limits) -> bytes:
    """The body, given up as soon as it is seen to be too large."""
    stated = http.headers.get("content-length", "0")
    limits.check_size(int(stated) if stated.isdecimal() else 0)
    body = bytearray()
    async for chunk in http.stream():
        limits.check_size(len(body) + len(chunk))
        body += chunk
    return bytes(body)


def _request_id(http: HttpRequest) -> str:
    """`x-request-id` as the caller or Serve's proxy set it, if it is a plain word; else one of our own."""
    given = http.headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w-]{1,64}", given, re.ASCII) else uuid.uuid4().hex


# --- Building and running ----------------------------------------------------------------------------------------

# Not as decorators: those would hide the classes, Serve would pickle them by value as they stand at that line, and the
# replicas would miss every name defined further down.
_MODEL = serve.deployment(name="Model")(Model)
_INGRESS = serve.deployment(name="Ingress", max_ongoing_requests=_INGRESS_REQUESTS)(serve.ingress(api)(Ingress))


class AppArgs(BaseModel):
    """What `serve run` and a serve config pass as `args`; the environment gives what they leave out."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(default_factory=lambda: os.environ.get("AF2_MODEL", ""))
    recipe: str = Field(default_factory=lambda: os.environ.get("AF2_RECIPE", ""))
    overrides: str = Field("", description="recipe overrides, separated by spaces: `serve.max_replicas=4`")


def app(args: dict[str, Any]) -> serve.Application:
    """Build the application.

    Args:
        args: `model` (exported folder, local or `s3://`), `recipe` (its `serve` block; without one: the defaults)
            and `overrides` of that recipe.

    Raises:
        ValueError: no model named, none there, or a recipe that contradicts itself.
    """
    given = AppArgs.model_validate(args)
    if not given.model:
        raise ValueError("which model? pass model=FOLDER (an exported model) or set AF2_MODEL")
    if given.overrides and not given.recipe:
        raise ValueError("overrides need a recipe to override: pass recipe=NAME too")
    settings = load_recipe(given.recipe, given.overrides.split()).serve if given.recipe else Serve()
    return build(_absolute(given.model), settings)


def build(folder: str, settings: Serve) -> serve.Application:
    """Bind the two deployments as `settings` sizes them."""
    if settings.min_replicas > settings.max_replicas:
        raise ValueError(
            f"serve.min_replicas={settings.min_replicas} exceeds serve.max_replicas={settings.max_replicas}"
        )
    scaling = {"min_replicas": settings.min_replicas, "max_replicas": settings.max_replicas}
    model = _MODEL.options(
        autoscaling_config={**scaling, "target_ongoing_requests": settings.target_ongoing_requests},
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": _num_gpus(settings)},
        max_ongoing_requests=2 * settings.max_batch_size,
        max_queued_requests=4 * settings.max_batch_size,
    )
    ingress = _INGRESS.options(
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": _INGRESS_REQUESTS / 4,
        },
        ray_actor_options={"num_cpus": 0.25},
    )
    return ingress.bind(model.bind(folder, settings), settings)


def _num_gpus(settings: Serve) -> float:
    if settings.gpus_per_replica != "auto":
        return float(settings.gpus_per_replica)
    return 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def _absolute(model: str) -> str:
    """Replicas run elsewhere: a local folder is named in full, and seen to be there."""
    if "://" in model:
        return model
    path = Path(model).resolve()
    if not (path / "config.json").is_file():
        raise ValueError(f"no model in {path}: name the folder that an export wrote, the one with config.json")
    return str(path)


@contextmanager
def run_app(model: str | Path, recipe: str = "", *, port: int = 0, overrides: Sequence[str] = ()) -> Iterator[str]:
    """Serve a model on this machine for the length of a `with` block; gives the `base_url` of OpenAI's client.

    Args:
        model: exported folder.
        recipe: whose `serve` block sizes the server; without one: the defaults.
        port: on 127.0.0.1; 0 takes a free one.
        overrides: of the recipe.

    Raises:
        ValueError: no such model or recipe, or the port is taken.
        RuntimeError: the model's replica did not start (Serve's message has the reason).
    """
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"port {port} of 127.0.0.1 is taken: choose another, or 0 for a free one") from error
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(app({"model": str(model), "recipe": recipe, "overrides": " ".join(overrides)}), name=APP_NAME)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        serve.delete(APP_NAME)
        if not serve.status().applications:
            serve.shutdown()
