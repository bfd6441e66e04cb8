"""A recipe: all settings of a run, and what must fit together across its blocks."""

from __future__ import annotations

import hashlib
from typing import Any

import yaml
from pydantic import Field, model_validator

from af2_ray.config.base import Strict
from af2_ray.config.data import Access, Corpus, Faults
from af2_ray.config.model import ModelSettings
from af2_ray.config.training import Checkpoints, Clap, Cluster, DeepSpeedSettings, FeatureCache, Stage
from af2_ray.config.use import Evaluation, Serve, Tracking

NOT_STATED = "not stated"  # the licence of what has none


class Recipe(Strict):
    """One run, whole: everything that decides its outcome."""

    name: str
    seed: int = 0
    storage: str = Field("runs", description="folder or s3:// prefix of run directories")
    data: str = Field("data", description="folder or s3:// prefix of corpora: what `$data` means in other settings")
    model: ModelSettings
    corpus: Corpus | None = None
    clap: Clap | None = None
    stages: list[Stage] = []
    feature_cache: FeatureCache = FeatureCache()
    checkpoints: Checkpoints = Checkpoints()
    faults: Faults = Faults()
    access: Access = Access()
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    cluster: Cluster = Cluster()
    evaluation: Evaluation = Evaluation()
    serve: Serve = Serve()
    tracking: Tracking = Tracking()
    licences: dict[str, str] = Field(
        {},
        description="licences of models and manifests that were brought along, by name or folder, for the model card",
    )

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, raw: Any) -> Any:
        """The settings with `$data` replaced."""
        data = raw.get("data", cls.model_fields["data"].default) if isinstance(raw, dict) else None
        return _replaced(raw, "$data", data.rstrip("/")) if isinstance(data, str) else raw

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: names must differ, got {names}")
        if self.model.start is not None and self.clap is not None:
            raise ValueError(
                f"model.start={self.model.start} brings its own audio tower, so AF-CLAP is not trained: set clap: null"
            )
        trained = {f"stages.{stage.name}": stage.optimizer for stage in self.stages}
        for name, optimizer in (trained | ({"clap": self.clap.optimizer} if self.clap else {})).items():
            if optimizer.muon_lr is not None and (self.deepspeed.zero_stage or self.deepspeed.precision == "bf16"):
                raise ValueError(
                    f"{name}.optimizer.muon_lr works on whole fp32 matrices, which ZeRO and bf16 flatten: "
                    "set deepspeed.zero_stage=0 and deepspeed.precision=fp32 (or mixed), or leave muon_lr out"
                )
        for stage in self.stages:
            if stage.budget.step_batches % self.cluster.num_workers:
                raise ValueError(
                    f"stages.{stage.name}.budget.step_batches={stage.budget.step_batches} is not a multiple of "
                    f"cluster.num_workers={self.cluster.num_workers}: every rank takes equally many rows a step"
                )
        if (
            self.clap
            and self.clap.optimizer.muon_lr is not None
            and not {"clap", "lm"} & {*self.clap.optimizer.muon_groups}
        ):
            raise ValueError(
                "clap.optimizer.muon_lr has nothing to train: set clap.optimizer.muon_groups=[clap, lm] (the audio "
                "tower; the text tower and both heads)"
            )
        if self.clap and self.clap.batch_size % self.cluster.num_workers:
            raise ValueError(
                f"clap.batch_size={self.clap.batch_size} is not a multiple of "
                f"cluster.num_workers={self.cluster.num_workers}"
            )
        if (
            self.clap
            and self.deepspeed.zero_stage == 3
            and (self.clap.windows_per_chunk or self.clap.captions_per_chunk)
        ):
            raise ValueError(
                "clap.windows_per_chunk and clap.captions_per_chunk need deepspeed.zero_stage 2 or less: with 3, ranks "
                "that have unlike numbers of chunks would wait for each other for ever"
            )
        return self

    def licence_of(self, name: str) -> str:
        """The licence of a model or a manifest: its own, or that of the nearest folder that has one."""
        while name:
            if name in self.licences:
                return self.licences[name]
            name = name.rpartition("/")[0]
        return NOT_STATED

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
        dump = self.model_dump(mode="json")
        if self.model.start is not None and self.model.start_digest is None:  # its sizes are the start's, still to come
            dump["model"] = self.model.model_dump(mode="json", exclude_unset=True)
        return yaml.safe_dump(dump, sort_keys=False, width=110)

    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of everything that decides the weights.

        The same after a change of workers, of what is measured and kept on the way, or of how much may fail; and as
        before a key was added, while that has its default (`base.later`).
        """
        left_out = (
            "storage",
            "data",
            "tracking",
            "serve",
            "evaluation",
            "cluster",
            "checkpoints",
            "licences",
            "faults",
            "access",
        )
        exclude: dict[str, Any] = {
            **dict.fromkeys(left_out, True),
            "feature_cache": {"dir": True},
            "model": {"start": True},  # wherever it lies: `start_digest` says which weights it has
            "clap": {"checkpoint_every": True},
            "stages": {
                place: {"checkpoint_every": True, "validation": True}
                for place, stage in enumerate(self.stages)
                if stage.export == "last"  # otherwise they decide which weights are the best
            },
        }
        kept = self.model_dump(mode="json", exclude=exclude)
        return hashlib.sha256(yaml.safe_dump(kept, sort_keys=True).encode()).hexdigest()[:16]


def _replaced(value: Any, name: str, text: str) -> Any:
    """A tree of settings with `text` wherever a string has `name`."""
    if isinstance(value, dict):
        return {key: _replaced(inner, name, text) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, name, text) for inner in value]
    return value.replace(name, text) if isinstance(value, str) else value
