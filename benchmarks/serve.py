"""The serving engine on this CPU: continuous batching against one slot and against static batches, and waiting times.

A model of the size of recipe `small` with random weights (LM 576 wide x 30 layers; 256 x 8 with --quick), HTSAT 32
wide. 16 clients ask one question after another, each about a clip of its own of 5 to 120 s (noise, uniform); answers
have forced lengths, log-uniform from 8 to 128 tokens. All in one process without HTTP.

- `throughput_vs_serial`: answers a second with 16 slots, over the same engine with one slot.
- `throughput_vs_static`: over static batches of the same engine: the 16 waiting questions, sorted by length of audio,
  in batches of 8, each as long as its longest answer, as `generate` does it. `throughput_vs_static_leaving`: over
  batches whose rows leave when they are done, which `generate` cannot.
- `ttft_p95_ratio`: 95th percentile of the time to the first token of 5 s clips while clips of 120 s are encoded and
  answered all the time, over an idle engine's. Arrivals fall anywhere in a step.
- `second_question_ttft_ratio`: time to the first token of a second question about a 5-minute clip, over the first
  question's. `second_question_http_ratio` (with --http): the same over HTTP and Ray Serve.

The last line is one JSON object.

    python benchmarks/serve.py [--quick] [--http]
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, PreTrainedTokenizerBase

from af2_ray.config import Serve
from af2_ray.engine.engine import Engine
from af2_ray.engine.request import Answer, Clip, Event, Piece, Request
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.htsat import tower_config
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration as Model
from af2_ray.models.random import random_model
from af2_ray.text import add_special_tokens, train_tokenizer

NUM_CLIENTS = 16
STATIC_BATCH = 8
CLIP_S = (5.0, 120.0)
TOKENS = (8, 128)
WORDS = "which of these sounds is heard first in the recording and how often does it come again"


def build(quick: bool) -> tuple[Model, PreTrainedTokenizerBase]:
    """A random model and a small tokenizer."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([WORDS], 300)
    audio_token_id = add_special_tokens(tokenizer)
    width, layers, heads, kv_heads, inner = (256, 8, 4, 2, 768) if quick else (576, 30, 9, 3, 1536)
    lm = LlamaConfig(
        vocab_size=8192 if quick else 49152,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config = AudioFlamingo2Config(
        text_config=lm,
        audio_config=tower_config(32, [1, 1, 2, 2], [1, 2, 4, 8], mlp_ratio=2),
        audio_token_id=audio_token_id,
        cross_attn_every=3,
        transform_layers=3,
        transform_heads=4,
        transform_inner_size=384,
    )
    return random_model(config), tokenizer


def clip(duration_s: float, rng: np.random.Generator) -> Clip:
    """Noise."""
    num = max(1, int(np.ceil(duration_s / 10)))
    windows = np.zeros((num, 160_000), np.int16)
    samples = round(duration_s * 16_000)
    windows.reshape(-1)[:samples] = rng.integers(-8000, 8000, samples, dtype=np.int16)
    return Clip.of(windows)


def make_requests(num: int, rng: np.random.Generator, longest: int) -> list[Request]:
    """Questions about clips of their own, with answers of a given length."""
    requests = []
    for number in range(num):
        tokens = round(float(np.exp(rng.uniform(np.log(TOKENS[0]), np.log(longest)))))
        heard = clip(float(rng.uniform(*CLIP_S)), rng)
        requests.append(
            Request(
                f"{WORDS} {number}?", (heard,), max_new_tokens=tokens, min_new_tokens=tokens, id=f"question {number}"
            )
        )
    return requests


def engine_of(parts: tuple[Model, PreTrainedTokenizerBase], num_slots: int) -> Engine:
    """A new engine, with nothing in its memory."""
    return Engine(*parts, Serve(num_slots=num_slots, audio_memory_mb=512, request_timeout_s=3600.0))


# --- Throughput --------------------------------------------------------------------------------------------------


def closed_loop(engine: Engine, requests: Sequence[Request], num_clients: int) -> float:
    """Seconds that clients take who ask again as soon as they are answered."""
    left, free = deque(requests), num_clients

    def listen(event: Event) -> None:
        nonlocal free
        if not isinstance(event, Piece):
            assert isinstance(event, Answer), event
            free += 1

    started = time.perf_counter()
    while True:
        while free and left:
            free -= 1
            engine.submit(left.popleft(), listen)
        if not engine.step() and not left:
            return time.perf_counter() - started


def static(engine: Engine, requests: Sequence[Request], *, leaving: bool) -> float:
    """Seconds in static batches of what waits, sorted by length of audio."""
    started = time.perf_counter()
    for start in range(0, len(requests), NUM_CLIENTS):
        waiting = sorted(requests[start : start + NUM_CLIENTS], key=lambda request: request.clips[0].num_windows)
        for first in range(0, len(waiting), STATIC_BATCH):
            batch = waiting[first : first + STATIC_BATCH]
            if not leaving:
                longest = max(request.max_new_tokens for request in batch)
                batch = [replace(request, max_new_tokens=longest, min_new_tokens=longest) for request in batch]
            assert all(isinstance(answer, Answer) for answer in engine.answer(batch))
    return time.perf_counter() - started


# --- Waiting times -----------------------------------------------------------------------------------------------


def short_question(rng: np.random.Generator) -> Request:
    """Five seconds, one token."""
    return Request(f"{WORDS}?", (clip(5, rng),), max_new_tokens=1)


def idle_ttft(engine: Engine, num: int, rng: np.random.Generator) -> list[float]:
    """Seconds to the first token, one question at a time."""
    questions = [short_question(rng) for _ in range(num)]
    return [answer_of(engine, question).first_token_s for question in questions]


def busy_ttft(engine: Engine, num: int, rng: np.random.Generator, pause_s: float) -> list[float]:
    """Seconds to the first token of short clips, one every `pause_s` or so, while four clients ask of long ones."""
    questions = deque(short_question(rng) for _ in range(num))
    long_clips = [clip(120, rng) for _ in range(6)]
    waits: list[float] = []
    long_free, asked = 4, 0

    def listen_long(event: Event) -> None:
        nonlocal long_free
        long_free += not isinstance(event, Piece)

    def listen_short(late_s: float, event: Event) -> None:
        if isinstance(event, Answer):
            waits.append(event.first_token_s + late_s)

    next_s = time.monotonic() + pause_s
    while len(waits) < num:
        engine.memory.clear()  # so that long clips are encoded again and again
        while long_free:
            long_free -= 1
            asked += 1
            heard = (long_clips[asked % len(long_clips)],)
            engine.submit(Request(f"{WORDS} {asked}?", heard, max_new_tokens=32, min_new_tokens=32), listen_long)
        while questions and (late_s := time.monotonic() - next_s) >= 0:
            engine.submit(questions.popleft(), partial(listen_short, late_s))
            next_s += pause_s * rng.uniform(0.5, 1.5)
        engine.step()
    engine.fail_all()
    return waits


def answer_of(engine: Engine, request: Request) -> Answer:
    """The one answer."""
    (answer,) = engine.answer([request])
    assert isinstance(answer, Answer), answer
    return answer


def second_question(engine: Engine, rng: np.random.Generator, rounds: int) -> tuple[float, float]:
    """Median seconds to the first token of the first and the second question about 5 minutes."""
    first, second = [], []
    for _ in range(rounds):
        heard = (clip(300, rng),)
        first.append(answer_of(engine, Request(f"{WORDS}?", heard, max_new_tokens=1)).first_token_s)
        second.append(answer_of(engine, Request("and how often?", heard, max_new_tokens=1)).first_token_s)
    return float(np.median(first)), float(np.median(second))


def second_question_http(parts: tuple[Model, PreTrainedTokenizerBase], rng: np.random.Generator) -> tuple[float, float]:
    """The same through Ray Serve and the `openai` client: a 5-minute FLAC, uploaded twice."""
    import soundfile as sf
    from openai import OpenAI

    from serve_apps.af2 import run_app

    file = io.BytesIO()
    sf.write(file, rng.uniform(-0.3, 0.3, 300 * 16_000), 16_000, format="FLAC")
    data = base64.b64encode(file.getvalue()).decode()

    def ask(client: Any, text: str) -> float:
        audio = {"type": "input_audio", "input_audio": {"data": data, "format": "flac"}}
        messages: Any = [{"role": "user", "content": [audio, {"type": "text", "text": text}]}]
        started = time.perf_counter()
        stream = client.chat.completions.create(
            model="af2", messages=messages, max_tokens=8, stream=True, logprobs=True
        )
        return next(time.perf_counter() - started for chunk in stream if chunk.choices and chunk.choices[0].logprobs)

    with tempfile.TemporaryDirectory() as folder:
        parts[0].save_pretrained(folder)
        parts[1].save_pretrained(folder)
        with run_app(Path(folder)) as url:
            client = OpenAI(base_url=url, api_key="none", timeout=600)
            return ask(client, "what is it?"), ask(client, "and how often?")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller LM, fewer and shorter answers")
    parser.add_argument("--http", action="store_true", help="a second question over HTTP, too (starts Ray)")
    arguments = parser.parse_args()
    quick = arguments.quick
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rng = np.random.default_rng(0)
    parts = build(quick)
    requests = make_requests(16 if quick else 64, rng, 48 if quick else TOKENS[1])
    idle = engine_of(parts, NUM_CLIENTS)
    answer_of(idle, short_question(rng))  # what is set up at first use is nobody's

    engine = engine_of(parts, NUM_CLIENTS)
    seconds = {"continuous": closed_loop(engine, requests, NUM_CLIENTS)}
    rows = engine.counts.rows / engine.counts.decode_steps
    seconds["serial"] = closed_loop(engine_of(parts, 1), requests, NUM_CLIENTS)
    seconds["static"] = static(engine_of(parts, STATIC_BATCH), requests, leaving=False)
    seconds["static_leaving"] = static(engine_of(parts, STATIC_BATCH), requests, leaving=True)
    for name, took_s in seconds.items():
        print(f"{name:16} {took_s:8.1f} s  {len(requests) / took_s:6.2f} answers/s")

    num = 10 if quick else 60
    idle_s = idle_ttft(idle, num, rng)
    busy_s = busy_ttft(idle, num, rng, pause_s=3 * float(np.median(idle_s)))
    p95_idle, p95_busy = (float(np.percentile(each, 95)) for each in (idle_s, busy_s))
    print(f"first token of 5 s, p95: idle {1000 * p95_idle:.0f} ms, while long clips are encoded {1000 * p95_busy:.0f}")
    first_s, second_s = second_question(idle, rng, 1 if quick else 3)
    print(f"first token of 5 min: {1000 * first_s:.0f} ms, second question {1000 * second_s:.0f} ms")
    result = {
        "throughput_vs_serial": seconds["serial"] / seconds["continuous"],
        "throughput_vs_static": seconds["static"] / seconds["continuous"],
        "throughput_vs_static_leaving": seconds["static_leaving"] / seconds["continuous"],
        "ttft_p95_ratio": p95_busy / p95_idle,
        "second_question_ttft_ratio": second_s / first_s,
        "answers_per_s": len(requests) / seconds["continuous"],
        "mean_rows": rows,
    }
    if arguments.http:
        first_s, second_s = second_question_http(parts, rng)
        print(f"the same over HTTP: {1000 * first_s:.0f} ms, {1000 * second_s:.0f} ms")
        result["second_question_http_ratio"] = second_s / first_s
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))


if __name__ == "__main__":
    main()
