"""The LM over the slots: reads prompts into new rows, and writes one token of every running row.

Shapes: B running rows, R rows that begin, T text tokens of the longest, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from af2_ray.engine.audio_attention import ClipsKV, Projection, RowsAudio
from af2_ray.engine.graph import StepGraph
from af2_ray.engine.slots import SlotCache
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration

Pairs = Sequence[tuple[str, Tensor]]


class Decoder:
    """A model's running rows.

    Args:
        num_slots: number of rows that can run at one time.
        room: text tokens, prompt and answer, that a row has room for at first.
    """

    def __init__(
        self,
        model: AudioFlamingo2ForConditionalGeneration,
        projection: Projection,
        *,
        num_slots: int,
        room: int,
        max_windows: int,
    ) -> None:
        self._model, self._projection = model, projection
        prefix = max_windows * projection.tokens_per_window if projection.is_prefix else 0
        num_layers = model.config.text_config.num_hidden_layers
        self._cache = SlotCache(num_layers, num_slots, prefix + room, model.device)
        self._rows_kv: list[ClipsKV | None] = []
        self._hearing: RowsAudio | None = None
        self._changed = True
        on_gpu = model.device.type == "cuda"
        self._graph = StepGraph(self._step, model.device, lambda: self._cache.length) if on_gpu else None

    @property
    def num_rows(self) -> int:
        """How many rows are running."""
        return self._cache.num_rows

    def prefill(self, prompts: Sequence[Sequence[int]], clips: Sequence[Pairs], max_new: Sequence[int]) -> Tensor:
        """Begin rows behind the running ones.

        Args:
            prompts: token ids of each.
            max_new: tokens that each answer may take.
            clips: pairs of a clip's key and what the LM hears of it, for each prompt, in the order of its markers.

        Returns:
            Logits [R, V] of the first token of each answer.
        """
        device = self._model.device
        ids = pad_sequence([torch.tensor(prompt, device=device) for prompt in prompts], batch_first=True)  # [R, T]
        embeds, lengths, audio = self._model.embed_tokens(ids), [len(prompt) for prompt in prompts], None
        rows_kv: list[ClipsKV | None] = [None] * len(prompts)
        if self._projection.is_prefix:
            whole = [
                torch.cat([*(part for _, part in pairs), row[:length]])
                for row, pairs, length in zip(embeds, clips, lengths, strict=True)
            ]
            lengths, embeds = [len(row) for row in whole], pad_sequence(whole, batch_first=True)
        else:
            rows_kv = [
                ClipsKV.of([k for k, _ in pairs], [part for _, part in pairs]) if pairs else None for pairs in clips
            ]
            markers = (ids == self._model.config.audio_token_id).cumsum(dim=1)
            audio = RowsAudio.of_prompts(rows_kv, markers, lengths, self._projection.places)
        self._changed = True  # whatever becomes of this: a recording may not outlive the slots it was made of
        self._cache.make_room(max(length + new for length, new in zip(lengths, max_new, strict=True)))
        mask = self._cache.before_prefill(lengths, embeds.dtype)
        hidden = self._forward(embeds, mask, torch.arange(embeds.shape[1], device=device)[None], audio)
        last = torch.tensor(lengths, device=device) - 1
        logits = self._model.compute_logits(hidden[torch.arange(len(lengths), device=device), last])
        self._cache.after_prefill(lengths)
        self._rows_kv += rows_kv
        self._changed = True
        return logits

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Add a token to every running row; logits [B, V] of the next."""
        device, lengths = self._model.device, self._cache.lengths
        if self._changed:
            self._hearing = RowsAudio.of_running(self._rows_kv, self._projection.places, device)
            self._changed = False
            if self._graph is not None:
                self._graph.forget()
        if self._graph is not None:
            logits = self._graph(tokens, lengths)
        else:
            now, places = (torch.tensor(values, device=device) for values in (tokens, lengths))
            logits = self._step(now, places, max(lengths) + 1)
        self._cache.after_decode()
        return logits

    def _step(self, tokens: Tensor, places: Tensor, longest: int) -> Tensor:
        """Logits [B, V] after tokens [B] at places [B] of their rows (`SlotCache.before_decode`)."""
        embeds = self._model.embed_tokens(tokens[:, None])  # [B, 1, D]
        positions, mask = self._cache.before_decode(places, longest, embeds.dtype)
        return self._model.compute_logits(self._forward(embeds, mask, positions, self._hearing)[:, -1])

    def remove(self, row: int) -> None:
        """End a row; the last row takes its number."""
        self._cache.remove(row)
        last = self._rows_kv.pop()
        if row < len(self._rows_kv):
            self._rows_kv[row] = last
        self._changed = True
        if not self._rows_kv:
            self._hearing = None  # nothing that was heard is held any longer by who hears nothing

    def close(self) -> None:
        """Cut the circles of references, so that the device's memory is free as soon as nobody holds the model."""
        self._graph = None
        self._cache.layers.clear()

    def _forward(self, embeds: Tensor, mask: Tensor, positions: Tensor, audio: RowsAudio | None) -> Tensor:
        """The LM's last hidden states [B, T, D]."""
        hears: dict[str, Any] = {"audio": audio} if audio is not None else {}
        output = self._model.language_model.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **hears,
        )
        return output.last_hidden_state
