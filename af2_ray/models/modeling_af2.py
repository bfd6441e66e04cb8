"""Audio Flamingo 2: an audio tower, an audio transformer, and an LM that hears through gated cross-attention.

Nothing is kept on layers between calls: what the text hears goes down as one keyword, and keys and values of the audio
live in the generation cache. Audio is ragged (real windows only, each clip once) until after the tower; padding to a
rectangle happens where it is cheap. The LM's rows stay untouched: the four added tokens have a parameter of their own,
joined at input and output.

Shapes: S windows of all clips, C clips, A audio tokens of the longest, B rows of text, K audios a row, T text tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from af2_ray.models.audio_states import AudioStates, Heard
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.cross_attention import AudioCache, AudioContext, GatedCrossAttention, GatedDecoderLayer
from af2_ray.models.htsat import AudioTower
from af2_ray.models.norms import fuse_norms
from af2_ray.models.packed_text import count_markers, see_themselves, text_numbers
from af2_ray.models.prefix import PrefixFusion
from af2_ray.models.transform import AudioTransform
from af2_ray.text import IGNORE, SPECIAL_TOKENS


@dataclass
class AudioFlamingo2Output(CausalLMOutputWithPast):
    """As `CausalLMOutputWithPast`; `loss` is the mean over answer tokens, `audio_states` can be passed in again."""

    audio_states: AudioStates | None = None


class AudioFlamingo2ForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The whole model; `forward` and `generate` take text beside waveforms, or beside states encoded before.

    Parameter groups: `audio_tower.*` (clap), `audio_transform.*` (transform), `*.cross_attention.*` (xattn),
    `added_embeddings*` (tokens), and the rest of `language_model.*` (lm).
    """

    config: AudioFlamingo2Config
    config_class = AudioFlamingo2Config
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["GatedDecoderLayer", "AudioTower"]  # noqa: RUF012 - transformers' own class attribute
    _keep_in_fp32_modules_strict = {"audio_encoder.batch_norm"}  # noqa: RUF012

    def __init__(self, config: AudioFlamingo2Config) -> None:
        super().__init__(config)
        self.audio_tower = AudioTower(config.audio_config)
        audio_width = self.audio_tower.output_size
        self.window_shape = self.audio_tower.window_shape if config.audio_features == "dense" else (1, 1)
        self.audio_transform = AudioTransform(config, audio_width, self.window_shape)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        fuse_norms(self.language_model)
        width = config.text_config.hidden_size
        layers = self.language_model.model.layers
        if config.fusion == "prefix":
            self.prefix = PrefixFusion(audio_width, width)
        for index, layer in enumerate(layers):
            attention = None
            if config.fusion == "xattn" and (index + 1) % config.cross_attn_every == 0:
                attention = GatedCrossAttention(config, audio_width, index)
            layers[index] = GatedDecoderLayer(layer, attention)
        self.added_embeddings = nn.Parameter(torch.empty(len(SPECIAL_TOKENS), width))
        if not config.text_config.tie_word_embeddings:
            self.added_embeddings_out = nn.Parameter(torch.empty(len(SPECIAL_TOKENS), width))
        self.post_init()
        self.generation_config.pad_token_id = config.pad_token_id
        self.generation_config.eos_token_id = _stop_ids(config)

    @classmethod
    def from_parts(
        cls, config: AudioFlamingo2Config, lm: PreTrainedModel, audio_tower: AudioTower
    ) -> AudioFlamingo2ForConditionalGeneration:
        """A new model around a trained LM and a trained tower, whose weights are copied.

        The added tokens start at the mean of the LM's rows with a little noise; the gates start at 0, so the model
        starts as the bare LM.
        """
        model = cls(config)
        model.audio_tower.load_state_dict(audio_tower.state_dict())
        layer = re.compile(r"^model\.layers\.\d+\.")  # which is wrapped here, and so has a longer name
        state = {layer.sub(r"\g<0>decoder_layer.", name): value for name, value in lm.state_dict().items()}
        fresh = model.language_model.state_dict()
        model.language_model.load_state_dict(
            state | {name: fresh[name] for name in fresh if ".cross_attention." in name}
        )
        model.init_added_embeddings()
        return model

    @torch.no_grad()
    def init_added_embeddings(self, noise: float = 0.1) -> None:
        """The added tokens at the mean of the LM's rows, plus `noise` times the rows' standard deviation."""
        tables = {"added_embeddings": self.language_model.get_input_embeddings()}
        if hasattr(self, "added_embeddings_out"):
            tables["added_embeddings_out"] = self.language_model.get_output_embeddings()
        for name, table in tables.items():
            rows = table.weight[: self.config.audio_token_id].float()
            parameter = getattr(self, name)
            scatter = noise * rows.std(dim=0) * torch.randn(parameter.shape, device=rows.device)
            parameter.copy_(rows.mean(dim=0) + scatter)

    def get_input_embeddings(self) -> nn.Module:
        """The LM's own table, without the added tokens."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The LM's own head, without the added tokens."""
        return self.language_model.get_output_embeddings()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the reference: PyTorch's linear initialisation in the new parts, gates at 0."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, AudioTransform) and module.time_features:
            init.normal_(module.time_embedding.weight, std=(1.5 * module.time_features) ** -0.5)  # as loud as the audio
        elif isinstance(module, GatedCrossAttention):
            init.zeros_(module.attn_gate)
            init.zeros_(module.ff_gate)
        elif module is self:
            for name, parameter in self.named_parameters(recurse=False):
                if name.startswith("added_embeddings"):
                    init.normal_(parameter, std=getattr(self.config.text_config, "initializer_range", 0.02))

    # --- Audio ------------------------------------------------------------------------------------------------------

    @property
    def tokens_per_window(self) -> int:
        """Audio tokens of a window, F."""
        return math.prod(self.window_shape)

    def embed_windows(self, waveforms: Tensor | None, *, tower_features: Tensor | None = None) -> Tensor:
        """Features [S, F, D] of windows [S, 160000], each window by itself: the first half of encoding a clip.

        Args:
            tower_features: features [S, F, D] that the tower made of the windows before; it is not run then.
        """
        features: Tensor = self.audio_tower(waveforms) if tower_features is None else tower_features.to(self.dtype)
        return features.mean(dim=1, keepdim=True) if self.config.audio_features == "pooled" else features

    def encode_audio(
        self,
        waveforms: Tensor | None,
        windows_per_clip: Tensor | Sequence[int],
        *,
        tower_features: Tensor | None = None,
    ) -> AudioStates:
        """Encode clips once, for any number of questions: windows [S, 160000] of C clips -> `AudioStates`.

        Args:
            tower_features: features [S, F, D] that the tower made of the windows before; it is not run then.
        """
        windows = waveforms if tower_features is None else tower_features
        counts = windows_per_clip.tolist() if isinstance(windows_per_clip, Tensor) else list(windows_per_clip)
        num_windows = 0 if windows is None else len(windows)
        if not counts or min(counts) < 1 or sum(counts) != num_windows:
            raise ValueError(f"windows_per_clip {counts} must be 1 or more each, {num_windows} (the windows) in all")
        if max(counts) > self.config.max_windows:
            raise ValueError(
                f"a clip of {max(counts)} windows is over the limit of {self.config.max_windows}: "
                "cut it when making windows, or raise max_windows in the configuration"
            )
        features = self.embed_windows(waveforms, tower_features=tower_features)
        lengths = [count * features.shape[1] for count in counts]
        return AudioStates.of_packed(self.audio_transform(features.flatten(0, 1), lengths), lengths)

    def _hear(
        self,
        input_ids: Tensor,
        states: AudioStates | None,
        audio_index: Tensor | None,
        cache: AudioCache | None,
        numbers: Tensor | None,
        is_known: bool,
    ) -> Heard | None:
        """What each row hears and where its `<audio>` markers are, from the arguments or the cache. None: no audio.

        `numbers` [B, T] are those of texts end to end, of which each has markers of its own.
        `is_known`: `audio_index` is known to fit clips and markers.
        """
        markers = count_markers(input_ids == self.config.audio_token_id, numbers)
        if cache is None or cache.tokens_heard is None:
            if states is None:
                return None
            heard = Heard.of(states, audio_index, markers, is_known=is_known, is_kept=cache is not None)
        else:
            markers = markers if cache.markers is None else markers + cache.markers[:, None]
            heard = Heard(states, audio_index, cache.tokens_heard, markers, first=False)
        if cache is not None:
            cache.tokens_heard, cache.markers = heard.tokens, markers[:, -1]
        return heard

    def _states(
        self,
        states: AudioStates | None,
        cache: AudioCache | None,
        waveforms: Tensor | None,
        windows_per_clip: Tensor | Sequence[int] | None,
        tower_features: Tensor | None,
    ) -> AudioStates | None:
        """The states that `forward` was given, or those of the windows it was given, unless the cache has them."""
        is_given = waveforms is not None or tower_features is not None
        if is_given and states is None and (cache is None or cache.tokens_heard is None):
            if windows_per_clip is None:
                raise ValueError("windows_per_clip is needed beside waveforms: the number of windows of each clip")
            states = self.encode_audio(waveforms, windows_per_clip, tower_features=tower_features)
        if states is not None and cache is not None and not isinstance(cache, AudioCache):
            raise ValueError(f"audio needs an AudioCache for past_key_values, not {type(cache).__name__}")
        return states

    # --- Text -------------------------------------------------------------------------------------------------------

    def _lm_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        heard: Heard | None,
        cache: AudioCache | None,
        numbers: Tensor | None,
    ) -> tuple[dict[str, Any], int]:
        """What the LM's layers take, and how many positions of it are a prefix of audio."""
        embeds, num_prefix = self.embed_tokens(input_ids), 0
        inputs: dict[str, Any] = {}
        if heard is not None and self.config.fusion == "xattn":
            inputs["audio"] = AudioContext.of(heard, self.dtype, cache)
        elif heard is not None:
            embeds, attention_mask, position_ids, num_prefix = self.prefix(heard, embeds, attention_mask, cache)
        if numbers is not None:
            attention_mask, position_ids = see_themselves(attention_mask, num_prefix, embeds.dtype)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        inputs |= {"inputs_embeds": embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        return inputs, num_prefix

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Embeddings [B, T, D]: the LM's rows, and the added tokens' own."""
        first = self.config.audio_token_id
        rows = self.language_model.get_input_embeddings()(input_ids.clamp(max=first - 1))
        added = self.added_embeddings[(input_ids - first).clamp(min=0)]
        return torch.where((input_ids >= first)[..., None], added.to(rows.dtype), rows)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] over the LM's tokens and the four added ones."""
        head = self.language_model.get_output_embeddings()
        added = getattr(self, "added_embeddings_out", self.added_embeddings)
        return torch.cat((head(hidden)[..., : self.config.audio_token_id], hidden @ added.to(hidden.dtype).T), dim=-1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        waveforms: Tensor | None = None,
        windows_per_clip: Tensor | Sequence[int] | None = None,
        audio_index: Tensor | None = None,
        audio_states: AudioStates | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: AudioCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        answers_only: bool = False,
        answer_places: Tensor | None = None,
        texts_per_row: int | None = None,
        tower_features: Tensor | None = None,
        **kwargs: Any,
    ) -> AudioFlamingo2Output:
        """One pass over text, hearing clips given as waveforms or as states encoded before, or none.

        Args:
            input_ids: ids of the text, [B, T], each row with one `<audio>` marker an audio, in order.
            attention_mask: mask of the text, [B, T], 1 where it is real, padding on either side. Texts end to end in a
                row are numbered 1, 2 ...: each has its own markers, hears the row's audios by them and sees itself.
            waveforms: windows of all clips, int16 or float in [-1, 1], [S, 160000].
            windows_per_clip: windows of each clip, [C], S in all.
            audio_index: clips of each row's audios, [B, K], -1 for none; left out, row b hears clip b.
            labels: ids to learn, [B, T], -100 where there are none; they give `loss`, the mean over answer tokens.
            logits_to_keep: number of last positions that get logits, or those positions in a tensor; 0 for all.
            answers_only: whether, with `labels`, logits [N, V] are computed only where the next token is an answer
                token, in the order of `labels[:, 1:][labels[:, 1:] != -100]`: a fraction of the memory.
            answer_places: those positions b * T + t, [N], where they are known; without `labels` there is no loss.
            texts_per_row: number of texts that stand in a row at most. Given with `windows_per_clip` and `audio_index`
                of the host, nothing is read from a GPU; that `audio_index` fits is then not checked.
            tower_features: features [S, F, D] in place of waveforms: what the tower made of them before.
        """
        is_known = texts_per_row is not None
        cache = AudioCache(config=self.config.text_config) if past_key_values is None and use_cache else past_key_values
        audio_states = self._states(audio_states, cache, waveforms, windows_per_clip, tower_features)
        numbers = text_numbers(attention_mask, self.config.text_config, texts_per_row)
        heard = None
        if audio_states or cache:
            heard = self._hear(input_ids, audio_states, audio_index, cache, numbers, is_known)
        inputs, num_prefix = self._lm_inputs(input_ids, attention_mask, position_ids, heard, cache, numbers)
        output = self.language_model.model(**inputs, past_key_values=cache, use_cache=bool(use_cache), **kwargs)
        hidden = output.last_hidden_state[:, num_prefix:]
        if answers_only or answer_places is not None:
            hidden = _answering(hidden, labels, answer_places)
        else:
            hidden = hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        logits = self.compute_logits(hidden)
        loss = None if labels is None else _mean_loss(logits, labels)
        return AudioFlamingo2Output(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache else None,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            audio_states=audio_states,
        )

    # --- Generation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        waveforms: Tensor | None = None,
        windows_per_clip: Tensor | Sequence[int] | None = None,
        audio_index: Tensor | None = None,
        audio_states: AudioStates | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate` (greedy, sampling, beams, streaming), hearing audio as `forward` does.

        Audio is encoded once, before the first token. Prompts of unequal length are padded on the left.
        """
        audio_states = self._states(audio_states, None, waveforms, windows_per_clip, None)
        if audio_states is not None and audio_index is None:
            # A tensor, so that beams and samples of a row take its clip along.
            audio_index = torch.arange(len(audio_states), device=audio_states.mask.device)[:, None]
        return super().generate(inputs, *args, audio_states=audio_states, audio_index=audio_index, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A cache that holds the audio too, unless the caller brings or forbids one."""
        wanted = generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None
        if wanted and generation_config.cache_implementation in (None, "dynamic"):
            model_kwargs["past_key_values"] = AudioCache(config=self.config.text_config)
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def _answering(hidden: Tensor, labels: Tensor | None, places: Tensor | None) -> Tensor:
    """Hidden states [N, D] of [B, T, D] where the next token is an answer's."""
    if places is not None:
        return hidden.flatten(0, 1).index_select(0, places)
    if labels is None:
        raise ValueError("answers_only needs labels: they say where the answers are")
    return hidden[:, :-1][labels[:, 1:] != IGNORE]


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over answer tokens; 0 with zero gradients if there are none."""
    targets = labels[:, 1:]
    if logits.dim() == 3:
        logits, targets = logits[:, :-1].flatten(0, 1), targets.flatten()
    else:
        targets = targets[targets != IGNORE]
    total = nnf.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)


def _stop_ids(config: AudioFlamingo2Config) -> list[int]:
    """Ids that end an answer: `<|endofchunk|>` and the LM's end of sequence."""
    eos = config.eos_token_id
    return [config.end_of_chunk_token_id, *([] if eos is None else eos if isinstance(eos, list) else [eos])]


AutoConfig.register(AudioFlamingo2Config.model_type, AudioFlamingo2Config, exist_ok=True)
AutoModelForCausalLM.register(AudioFlamingo2Config, AudioFlamingo2ForConditionalGeneration, exist_ok=True)
