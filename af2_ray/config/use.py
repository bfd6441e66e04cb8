"""Settings of evaluation, server and tracking."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from af2_ray.config.base import Strict
from af2_ray.config.data import Dataset


class Evaluation(Strict):
    """What `jobs/evaluate.py` scores after training."""

    manifests: list[Dataset] = []
    seen_manifests: list[Dataset] = Field([], description="manifests of new scenes of TRAINING source clips")
    captions: str | None = Field(None, description="AF-CLAP caption sets for retrieval and order choice")
    gallery: int = Field(200, ge=2)
    max_windows: int = Field(30, ge=1)
    max_new_tokens: int = Field(24, ge=1)
    batch_windows: int = Field(32, ge=1)
    ask: str | None = Field(None, description="question the demo asks over HTTP; none: one of the test split")


class Serve(Strict):
    """The server's size: replicas, GPUs a replica, autoscaling bounds and limits of a request."""

    model_name: str = "af2"
    more_models: dict[str, str] = Field(
        {},
        description="further models by name: their export folders, or small parts of the served model (folders `part` "
        "beside exports), loaded by the replicas that are asked for them",
    )
    more_models_per_replica: int = Field(
        1, ge=1, description="number of these that a replica holds; the longest unused one makes room"
    )
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(4, gt=0, strict=False)
    target_windows: float = Field(
        60, gt=0, strict=False, description="10 s windows that a replica should have at a time; more: another replica"
    )
    upscale_delay_s: float = Field(15.0, ge=0, strict=False)
    downscale_delay_s: float = Field(300.0, ge=0, strict=False)
    cpus_per_replica: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        union_mode="left_to_right",
        description="CPUs of a replica of the model, or of AF-CLAP; auto: one, on a small machine a share",
    )
    gpus_per_replica: float | Literal["auto"] = Field(
        "auto",
        union_mode="left_to_right",
        description="GPUs of a replica; auto: one where the connected cluster (if none is, this machine) has any",
    )
    embedding_gpus: float = Field(
        0.0, ge=0, strict=False, description="GPUs of a replica that embeds, with clap=FOLDER"
    )
    num_slots: int = Field(8, ge=1, description="answers that a replica writes at one time")
    encode_windows: int | Literal["auto"] = Field("auto", description="10 s windows encoded between two tokens")
    prefill_tokens: int = Field(1024, ge=1, description="prompt tokens read between two tokens of running answers")
    audio_memory_mb: int = Field(
        1024, ge=1, description="MB of encoded audio that a replica keeps for further questions"
    )
    max_audio_s: float = Field(300.0, gt=0, strict=False, description="seconds of audio of a request, all clips")
    max_body_mb: int = Field(64, ge=1, description="MiB of a request, its audio in base64")
    max_new_tokens: int = Field(256, ge=1)
    max_prompt_tokens: int = Field(
        4096, ge=1, description="tokens of a prompt at most; fewer where the language model has fewer positions"
    )
    request_timeout_s: float = Field(120.0, gt=0, strict=False, description="seconds until a request is given up")
    requests_per_minute: int = Field(
        0, ge=0, description="answers of one API key a minute (n counts as n), at one ingress replica; 0: any number"
    )
    open: bool = Field(False, description="whether a server without API keys may listen to other machines than its own")
    share_audio: bool = Field(
        False,
        description="whether a recording is kept for all API keys alike; else each key has its own, and learns "
        "nothing of the others'",
    )
    ingress_memory_mb: int = Field(
        1024, ge=1, description="MiB that the requests at one ingress replica may hold; at least 4 x max_body_mb"
    )
    body_timeout_s: float = Field(
        30.0, gt=0, strict=False, description="seconds for the body of a request, and one more for each 64 KiB of it"
    )
    decoders: int = Field(2, ge=1, description="processes of an ingress replica that decode audio")
    decoder_memory_mb: int = Field(512, ge=64, description="MiB that each of these may take")
    audio_url_hosts: list[str] = Field([], description="hosts that https recordings may be fetched from; `*`: any")
    audio_url_prefixes: list[str] = Field([], description="object-store folders that recordings may be read from")
    answers_per_key: int = Field(
        0, ge=0, description="answers of one API key that a replica writes at one time; 0: as many as there are slots"
    )
    keep_audio_s: float = Field(
        3600.0,
        ge=0,
        strict=False,
        description="seconds that a replica keeps encoded audio after its last use; 0: not beyond the answer",
    )
    max_failed_steps: int = Field(
        3,
        ge=1,
        description="number of failed steps in a row after which a replica tests itself; unhealthy if that fails",
    )
    stall_s: float = Field(
        60.0, gt=0, strict=False, description="seconds of a step beyond which a replica counts as unhealthy"
    )

    @model_validator(mode="after")
    def _bounds(self) -> Serve:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} exceeds max_replicas={self.max_replicas}")
        if taken := {self.model_name, f"{self.model_name}-clap"} & set(self.more_models):
            raise ValueError(f"more_models has {sorted(taken)}, which is taken already: choose other names")
        return self


class Tracking(Strict):
    """MLflow; without a uri the run directory gets a SQLite store of its own."""

    uri: str | None = None
    experiment: str = "af2_ray"
    register_model: bool = Field(True, description="whether the last stage's export is registered, as serve.model_name")
