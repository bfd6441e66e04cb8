"""The LM over the slots: reads prompts into new rows, and writes one token of every running row.

There are two ways to write, which give the same answers. On a GPU a step is a recording (`graph`), so everything that
it reads stays where it is: what is heard is copied into a rectangle (`audio_pool`), and rows without an answer fill
the step up to a size. On a CPU nothing is padded and nothing copied: rows attend to the kept clips themselves
(`audio_attention`).

Shapes: B running rows, S slots, R rows that begin or rows of a recording, T text tokens of the longest, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from af2_ray.engine.audio_attention import ClipsKV, Projection, RowsAudio
from af2_ray.engine.audio_pool import AudioPool, Reach, power_of_two
from af2_ray.engine.graph import Recorder, StepGraphs, recorder_of
from af2_ray.engine.slots import SlotCache
from af2_ray.engine.transfer import send, upload
from af2_ray.models.cross_attention import Audio
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration

Pairs = Sequence[tuple[str, Tensor]]

_LEAST_TEXT = 64
"""Text tokens of a recording at least; more are a power of two."""


@dataclass(frozen=True)
class StepSize:
    """What a recording is of: so many rows, the text that they attend to, and how far they hear."""

    rows: int
    text: int
    reach: Reach


class Decoder:
    """A model's running rows.

    Args:
        num_slots: number of rows that can run at one time.
        room: text tokens, prompt and answer, that a row has room for at first.
        recorder: what records steps; none: what the device has, if anything.

    Attributes:
        graphs: recordings of the decoding step; none: it is launched anew each time.
    """

    def __init__(
        self,
        model: AudioFlamingo2ForConditionalGeneration,
        projection: Projection,
        *,
        num_slots: int,
        room: int,
        max_windows: int,
        recorder: Recorder | None = None,
    ) -> None:
        self._model, self._projection = model, projection
        prefix = max_windows * projection.tokens_per_window if projection.is_prefix else 0
        num_layers = model.config.text_config.num_hidden_layers
        self._cache = SlotCache(num_layers, num_slots, prefix + room, model.device)
        self._rows_kv: list[ClipsKV | None] = []
        self._hearing: RowsAudio | None = None
        self._changed = True
        recorder = recorder or recorder_of(model.device)
        self.graphs = None if recorder is None else StepGraphs(recorder)
        self._pool = AudioPool(projection.places, projection.tokens_per_window, num_slots)
        self._inputs = torch.zeros((3, num_slots), dtype=torch.long, device=model.device)
        """Of a recorded step: tokens, the places they take in their rows, and audio tokens that the rows hear."""

    @property
    def num_rows(self) -> int:
        """How many rows are running."""
        return self._cache.num_rows

    @property
    def num_slots(self) -> int:
        """How many rows can run at one time."""
        return self._cache.num_slots

    @property
    def audio_bytes(self) -> int:
        """Bytes of copies of what running rows hear."""
        return self._pool.num_bytes

    def prefill(self, prompts: Sequence[Sequence[int]], clips: Sequence[Pairs], max_new: Sequence[int]) -> Tensor:
        """Begin rows behind the running ones.

        Args:
            prompts: token ids of each.
            max_new: tokens that each answer may take.
            clips: each clip's key and what the LM hears of it, for each prompt, in the order of its markers.

        Returns:
            Logits [R, V] of the first token of each answer.
        """
        device = self._model.device
        ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)  # [R, T], the host's
        embeds, lengths, audio = self._model.embed_tokens(send(ids, device)), [len(prompt) for prompt in prompts], None
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
            audio = RowsAudio.of_prompts(rows_kv, markers, lengths, self._projection.places, device)
        self._make_room(max(length + new for length, new in zip(lengths, max_new, strict=True)), rows_kv)
        mask = self._cache.before_prefill(lengths, embeds.dtype)
        hidden = self._forward(embeds, mask, torch.arange(embeds.shape[1], device=device)[None], audio)
        last = upload([length - 1 for length in lengths], device)
        logits = self._model.compute_logits(hidden[torch.arange(len(lengths), device=device), last])
        self._cache.after_prefill(lengths)
        if self.graphs is None:
            self._rows_kv += rows_kv
            self._changed = True
        else:
            self._pool.add([clips and clips.kv for clips in rows_kv])
        return logits

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Add a token to every running row; logits [B, V] of the next, which stand until the next step."""
        device, lengths = self._model.device, self._cache.lengths
        if self.graphs is not None:
            logits = self._decode_padded(self.graphs, tokens)
        else:
            if self._changed:
                self._hearing = RowsAudio.of_running(self._rows_kv, self._projection.places, device)
                self._changed = False
            now, places = upload([tokens, lengths], device)
            logits = self._step(now, places, max(lengths) + 1, self._hearing)
        self._cache.after_decode()
        return logits

    def remove(self, row: int) -> None:
        """End a row; the last row takes its number."""
        self._cache.remove(row)
        if self.graphs is not None:
            self._pool.remove(row)
            return
        last = self._rows_kv.pop()
        if row < len(self._rows_kv):
            self._rows_kv[row] = last
        self._changed = True
        if not self._rows_kv:
            self._hearing = None  # nothing that was heard is held any longer by who hears nothing

    def close(self) -> None:
        """Cut the circles of references, so that the device's memory is free as soon as nobody holds the model."""
        if self.graphs is not None:
            self.graphs.forget()
        self._pool.close()
        self._cache.layers.clear()

    def _make_room(self, length: int, rows_kv: Sequence[ClipsKV | None]) -> None:
        """For new rows of up to `length` tokens of text; recordings go if anything moves."""
        if self.graphs is None:
            self._cache.make_room(length)
            return
        moved = True  # some of it, if memory is short
        try:
            moved = self._cache.make_room(length) | self._pool.make_room([clips and clips.kv for clips in rows_kv])
        finally:
            if moved:
                self.graphs.forget()

    def _decode_padded(self, graphs: StepGraphs, tokens: Sequence[int]) -> Tensor:
        """A step of a size that others have too; logits [B, V]."""
        lengths, num_slots = self._cache.lengths, self._cache.num_slots
        text = min(self._cache.length, max(_LEAST_TEXT, power_of_two(max(lengths) + 1)))
        size = StepSize(self._pool.num_rows(len(tokens)), text, self._pool.reach())
        rest = [0] * (num_slots - len(tokens))
        values = [[*row, *rest] for row in (tokens, lengths, self._pool.lengths)]
        self._inputs.copy_(upload(values, self._inputs.device))
        return graphs(size, partial(self._padded_step, size))[: len(tokens)]

    def _padded_step(self, size: StepSize) -> Tensor:
        """Logits [R, V] after what stands in the buffers."""
        tokens, places, heard = self._inputs[:, : size.rows]
        return self._step(tokens, places, size.text, self._pool.audio(heard, size.reach))

    def _step(self, tokens: Tensor, places: Tensor, longest: int, audio: Audio | None) -> Tensor:
        """Logits [B, V] after tokens [B] at places [B] of their rows (`SlotCache.before_decode`)."""
        embeds = self._model.embed_tokens(tokens[:, None])  # [B, 1, D]
        positions, mask = self._cache.before_decode(places, longest, embeds.dtype)
        return self._model.compute_logits(self._forward(embeds, mask, positions, audio)[:, -1])

    def _forward(self, embeds: Tensor, mask: Tensor, positions: Tensor, audio: Audio | None) -> Tensor:
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
