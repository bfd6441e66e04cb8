"""The model behind OpenAI's chat completions, on Ray Serve.

    serve run serve_apps.af2:app model=runs/demo/model recipe=tiny
    curl localhost:8000/v1/models

Deployments scale each on its own: the ingress checks requests and decodes audio on CPUs and never loads a model; the
model's replicas answer by continuous batching (`af2_ray.engine.engine`); with `clap=FOLDER`, AF-CLAP's embed.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import cloudpickle, serve

from af2_ray.cluster import capacity, prospect, shortage
from af2_ray.config import Serve, load_recipe
from af2_ray.storage.parts import is_part
from af2_ray.storage.places import is_remote
from af2_ray.storage.stores import MODEL, PART, model_folder
from serve_apps import ingress
from serve_apps.admission import LEAST_RATE
from serve_apps.embedding import REQUESTS_PER_PASS, Clap
from serve_apps.ingress import Ingress, api
from serve_apps.keys import KeySource
from serve_apps.replica import Model, check_parts

APP_NAME = "af2"
_LEAVING_S = 5.0
_INGRESS_CPUS = 0.25
_LEAST_CPUS = 0.1
_INGRESS_REQUESTS = 1024  # at one replica of the ingress: slow uploads too; memory is what bounds them
_INGRESS_LOAD = 16  # requests that a replica of the ingress should have at a time; more: another one
_HEALTH_S = 5.0  # Serve replaces a replica after three failed checks

# By value, once the module is whole: `serve.ingress` rewrites the signatures of the handlers in this process, and a
# replica that imported the module itself would take `self` for a parameter of the request (and answer 422).
cloudpickle.register_pickle_by_value(ingress)
# Not as decorators: those would hide the classes, and the replicas would miss every name defined further down.
_MODEL = serve.deployment(name="Model")(Model)
_CLAP = serve.deployment(
    name="Clap", max_ongoing_requests=2 * REQUESTS_PER_PASS, max_queued_requests=8 * REQUESTS_PER_PASS
)(Clap)
_INGRESS = serve.deployment(
    name="Ingress", max_ongoing_requests=_INGRESS_REQUESTS, max_queued_requests=_INGRESS_REQUESTS
)(serve.ingress(api)(Ingress))


class AppArgs(BaseModel):
    """What `serve run` and a serve config pass as `args`; the environment gives what they leave out."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(default_factory=lambda: os.environ.get("AF2_MODEL", ""))
    recipe: str = Field(default_factory=lambda: os.environ.get("AF2_RECIPE", ""))
    clap: str = Field(default_factory=lambda: os.environ.get("AF2_CLAP", ""))
    overrides: str = Field("", description="recipe overrides, separated by spaces: `serve.max_replicas=4`")


def app(args: dict[str, Any]) -> serve.Application:
    """Build the application.

    Args:
        args: `model` (exported folder, local or `s3://`), `recipe` (its `serve` block; without one: the defaults),
            `overrides` of that recipe, and `clap` (an AF-CLAP export, for embeddings and labels; without: neither).

    Raises:
        ValueError: no model named, none there, a small part of another one, or a recipe that contradicts itself.
    """
    given = AppArgs.model_validate(args)
    if not given.model:
        raise ValueError("which model? pass model=FOLDER (an exported model) or set AF2_MODEL")
    if given.overrides and not given.recipe:
        raise ValueError("overrides need a recipe to override: pass recipe=NAME too")
    settings = _settings(given)
    folder = _absolute(given.model)
    more = {name: _absolute(one, may_be_part=True) for name, one in settings.more_models.items()}
    if not is_remote(folder):  # a replica has it anyway, and sees to the same
        check_parts(more, folder)
    settings = settings.model_copy(update={"more_models": more})
    return build(folder, settings, _absolute(given.clap) if given.clap else None)


def _settings(given: AppArgs) -> Serve:
    return load_recipe(given.recipe, given.overrides.split()).serve if given.recipe else Serve()


def longest_s(settings: Serve) -> float:
    """Seconds that a request can take from its first byte to the end of its answer, for Serve's `request_timeout_s`.

    The ingress has limits of its own for each part. What is still there then is a reader who does not read.
    """
    body_s = settings.body_timeout_s + settings.max_body_mb * 2**20 / LEAST_RATE
    return body_s + 2 * settings.request_timeout_s + _LEAVING_S


def build(folder: str, settings: Serve, clap: str | None = None) -> serve.Application:
    """Bind the deployments as `settings` sizes them."""
    have = prospect()
    cpus, gpus = _cpus(settings, have, clap=bool(clap)), _gpus(settings, have)
    _check_fit(settings, have, cpus, gpus, clap=bool(clap))
    leaving_s = settings.request_timeout_s + _LEAVING_S  # a replica that leaves writes its answers to their end
    scaling = {"min_replicas": settings.min_replicas, "max_replicas": settings.max_replicas}
    model = _MODEL.options(
        autoscaling_config={
            **scaling,
            "upscale_delay_s": settings.upscale_delay_s,
            "downscale_delay_s": settings.downscale_delay_s,
            "policy": {
                "policy_function": "serve_apps.scaling:ByWindows",
                "policy_kwargs": {"windows": settings.target_windows, "requests": settings.target_ongoing_requests},
            },
        },
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        graceful_shutdown_timeout_s=leaving_s,
        health_check_period_s=_HEALTH_S,
        max_ongoing_requests=4 * settings.num_slots,
        max_queued_requests=8 * settings.num_slots,
    )
    front = _INGRESS.options(
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": _INGRESS_LOAD,
        },
        ray_actor_options={"num_cpus": _INGRESS_CPUS},
        graceful_shutdown_timeout_s=leaving_s,
    )
    embedder = _CLAP.options(
        autoscaling_config={"min_replicas": _min_embedders(settings), "max_replicas": settings.max_replicas},
        ray_actor_options={"num_cpus": cpus, "num_gpus": settings.embedding_gpus},
        graceful_shutdown_timeout_s=leaving_s,
        health_check_period_s=_HEALTH_S,
    )
    keys = KeySource.of_environment()  # of who deploys: a replica's environment may be another
    return front.bind(model.bind(folder, settings), settings, embedder.bind(clap) if clap else None, keys)


def _cpus(settings: Serve, have: Mapping[str, float] | None, *, clap: bool) -> float:
    """CPUs of a replica of the model, and of AF-CLAP."""
    if settings.cpus_per_replica != "auto":
        return settings.cpus_per_replica
    standing = max(1, settings.min_replicas) + (max(1, _min_embedders(settings)) if clap else 0)
    if have is None or have.get("CPU", 0.0) >= standing + _INGRESS_CPUS:
        return 1.0
    share = (have.get("CPU", 0.0) - _INGRESS_CPUS) / standing
    return max(_LEAST_CPUS, math.floor(1000 * share) / 1000)


def _gpus(settings: Serve, have: Mapping[str, float] | None) -> float:
    """GPUs of a replica of the model."""
    if settings.gpus_per_replica != "auto":
        return float(settings.gpus_per_replica)
    return 1.0 if (capacity() if have is None else have).get("GPU", 0.0) >= 1 else 0.0


def _min_embedders(settings: Serve) -> int:
    return min(1, settings.min_replicas)


def _check_fit(settings: Serve, have: Mapping[str, float] | None, cpus: float, gpus: float, *, clap: bool) -> None:
    """A server whose first replicas never fit is an error; Serve would wait for room without end."""
    if have is None:
        return
    models, embedders = settings.min_replicas, _min_embedders(settings) if clap else 0
    need = {
        "CPU": models * cpus + embedders * cpus + _INGRESS_CPUS,
        "GPU": models * gpus + embedders * settings.embedding_gpus,
    }
    if missing := shortage(need, have):
        parts = [f"{models} x {_amount(cpus, gpus)} for the model"]
        if clap:
            parts.append(f"{embedders} x {_amount(cpus, settings.embedding_gpus)} for AF-CLAP")
        raise ValueError(
            f"the server needs {missing}: {', '.join(parts)}, {_INGRESS_CPUS:g} CPUs for the ingress; lower "
            "serve.min_replicas, serve.cpus_per_replica or serve.gpus_per_replica, or start more nodes"
        )


def _amount(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")


def _absolute(model: str, *, may_be_part: bool = False) -> str:
    """Replicas run elsewhere: a local folder is named in full, and seen to be there."""
    if is_remote(model):
        return model
    path = Path(model).resolve()
    model_folder(path, PART if may_be_part and is_part(path) else MODEL)
    return str(path)


@contextmanager
def run_app(
    model: str | Path, recipe: str = "", *, port: int = 0, overrides: Sequence[str] = (), clap: str | Path = ""
) -> Iterator[str]:
    """Serve a model on this machine for the length of a `with` block; gives the `base_url` of OpenAI's client.

    Args:
        model: exported folder.
        recipe: name or file of the recipe whose `serve` block sizes the server; without one: the defaults.
        port: port of 127.0.0.1; 0 takes a free one.
        overrides: keys of the recipe with other values.
        clap: AF-CLAP folder, for embeddings and labels.

    Raises:
        ValueError: no such model or recipe, or the port is taken.
        RuntimeError: the model's replica did not start (Serve's message has the reason).
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended is none
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"port {port} of 127.0.0.1 is taken: choose another, or 0 for a free one") from error
        port = probe.getsockname()[1]
    args = {"model": str(model), "recipe": recipe, "overrides": " ".join(overrides), "clap": str(clap)}
    longest = longest_s(_settings(AppArgs.model_validate(args)))
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": longest})
    try:
        serve.run(app(args), name=APP_NAME)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        serve.delete(APP_NAME)
        if not serve.status().applications:
            serve.shutdown()
