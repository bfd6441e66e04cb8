"""What a GPU does slowly the first time, done before anybody waits for it: plans, kernels to load, recordings."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from af2_ray.audio.windows import WINDOW_SAMPLES
from af2_ray.engine.audio_attention import Projection
from af2_ray.engine.decoder import Decoder
from af2_ray.engine.encoder import Encoder
from af2_ray.text import encode

_RECORDED_AT = 2
"""Steps of a size until it is recorded."""


def warm_up(
    encoder: Encoder,
    projection: Projection,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    max_windows: int,
    most_bytes: int,
) -> None:
    """Encode silence in turns of all sizes, and record steps, for an engine that has nothing else to do.

    Args:
        max_windows: windows of the longest clips; steps are recorded with these if the decoder's copies of them, one
            for each slot, take `most_bytes` at most, else with short ones.
    """
    _encode_all_sizes(encoder)
    fits = decoder.num_slots * projection.projected_bytes(max_windows) <= most_bytes
    num_windows = max_windows if fits else min(2, max_windows)
    states = encoder.encode_one(np.zeros((num_windows, WINDOW_SAMPLES), np.int16))
    parts = projection(states, num_windows), projection(states[: projection.tokens_per_window], 1)
    _record_steps(decoder, [int(token) for token in encode(tokenizer, ["?"]).input_ids[0]], *parts)


def _encode_all_sizes(encoder: Encoder) -> None:
    """Encode 1, 2, 4 ... windows, up to those of a turn: a Fourier transform is planned for each."""
    num = 1
    while True:
        encoder.encode_one(np.zeros((num, WINDOW_SAMPLES), np.int16))
        if num >= encoder.budget:
            return
        num *= 2


def _record_steps(decoder: Decoder, ids: list[int], long: Tensor, short: Tensor) -> None:
    """Record steps of all numbers of rows, of the shortest text, that hear clips of one length or of unlike ones.

    The largest comes first, after which nothing moves. Other sizes are recorded when they are met.
    """
    powers = [1 << power for power in range(decoder.num_slots.bit_length())]
    for num in sorted({*powers, decoder.num_slots}, reverse=True):
        for last in (long, short):
            clips = [[("long", long)]] * (num - 1) + [[("last", last)]]
            try:
                decoder.prefill([ids] * num, clips, [_RECORDED_AT] * num)
                for _ in range(_RECORDED_AT):
                    decoder.decode([ids[0]] * num)
            finally:
                for row in reversed(range(decoder.num_rows)):
                    decoder.remove(row)
