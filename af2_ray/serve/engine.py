"""Batched answers from one model on one device; knows nothing of Ray or HTTP.

A batch mixes requests freely: clips of unequal length, several clips or none, and each its own length, sampling, seed
and stop strings. Rows are sampled by generators of their own, so an answer does not depend on what shares its batch.
The trade-off of static batches: a batch ends when its longest answer does, and one lock lets one batch run at a time.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import fsspec
import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from af2_ray.audio.windows import WINDOW_S, WINDOW_SAMPLES
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration
from af2_ray.serve.request import Answer, Failure, FinishReason, Request
from af2_ray.text import END_OF_CHUNK, encode

logger = logging.getLogger(__name__)

_FAILED = Failure("the model failed on this request; the log has the reason", by_caller=False)


@dataclass
class Engine:
    """A model and its tokenizer, ready to answer; safe to call from several threads."""

    model: AudioFlamingo2ForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int = 512
    max_time_s: float | None = None
    """A batch that runs longer is cut off where it is."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _busy_since: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.model.eval()

    @classmethod
    def from_pretrained(cls, folder: str, device: str = "auto", *, max_time_s: float | None = None) -> Engine:
        """Load an exported model (local folder or `s3://...`); `auto`: a GPU in bf16 if there is one, else CPU."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        with tempfile.TemporaryDirectory() as scratch:
            local = _local(folder, Path(scratch))
            model = AudioFlamingo2ForConditionalGeneration.from_pretrained(local, dtype=dtype).to(device)
            tokenizer = AutoTokenizer.from_pretrained(local)
        logger.info("loaded %s on %s as %s", folder, device, dtype)
        return cls(model, tokenizer, getattr(model.config, "max_text_tokens", None) or 512, max_time_s)

    def busy_s(self) -> float:
        """How long the running batch has been running; 0 when idle."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def answer(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        """Answer all requests in one batch, in order; one that cannot be answered never takes the others with it."""
        results: list[Answer | Failure | None] = [self._fault(request) for request in requests]
        good = [index for index, result in enumerate(results) if result is None]
        for index, result in zip(good, self._generate_safely([requests[index] for index in good]), strict=True):
            results[index] = result
        return [result for result in results if result is not None]

    def stream(self, request: Request, cancelled: threading.Event | None = None) -> Iterator[str | Answer | Failure]:
        """Answer one request piece by piece; the last item is the whole `Answer`, or a `Failure`.

        Setting `cancelled`, or closing the iterator, ends the generation at its next token.
        """
        if fault := self._fault(request):
            yield fault
            return
        cancelled = cancelled or threading.Event()
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        outcome: list[Answer | Failure] = []

        def run() -> None:
            try:
                outcome.extend(self._generate([request], streamer, cancelled))
            except Exception:  # as for batches: logged here, told to the caller
                logger.exception("request %s failed", request.id)
                outcome.append(_FAILED)
            streamer.on_finalized_text("", stream_end=True)

        worker = threading.Thread(target=run, name=f"stream-{request.id}", daemon=True)
        worker.start()
        cutter = _StopCutter(request.stop)
        try:
            for piece in streamer:
                if text := cutter.feed(piece):
                    yield text
            if text := cutter.rest():
                yield text
        finally:
            cancelled.set()
        worker.join()
        yield outcome[-1]

    # --- Checks --------------------------------------------------------------------------------------------------

    def _fault(self, request: Request) -> Failure | None:
        """What is wrong with a request, found before it can share a batch."""
        for clip in request.clips:
            if clip.ndim != 2 or clip.shape[1] != WINDOW_SAMPLES or not len(clip) or clip.dtype != np.int16:
                return Failure(f"a clip must be int16 [W, {WINDOW_SAMPLES}], got {clip.dtype} {clip.shape}", True)
            if len(clip) > self.model.config.max_windows:
                limit_s = self.model.config.max_windows * WINDOW_S
                return Failure(f"a recording is longer than the model's {limit_s} s: send a shorter stretch", True)
        try:
            text = encode(
                self.tokenizer, [request.prompt], max_tokens=self.max_prompt_tokens, num_audios=len(request.clips)
            )
        except ValueError as error:
            return Failure(str(error), by_caller=True)
        if text.num_truncated:
            return Failure(f"the prompt is longer than {self.max_prompt_tokens} tokens: shorten it", by_caller=True)
        return None

    # --- Generation ----------------------------------------------------------------------------------------------

    def _generate_safely(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        """One batch; if it fails, each request alone, so that the one at fault fails alone (memory, for instance)."""
        if not requests:
            return []
        try:
            return list(self._generate(requests))
        except Exception:  # the model may raise anything; it is logged, and the caller is told
            logger.exception("batch of %s failed", [request.id for request in requests])
        if len(requests) == 1:
            return [_FAILED]
        return [result for request in requests for result in self._generate_safely([request])]

    @torch.inference_mode()
    def _generate(
        self,
        requests: Sequence[Request],
        streamer: TextIteratorStreamer | None = None,
        cancelled: threading.Event | None = None,
    ) -> list[Answer]:
        with self._lock:
            self._busy_since = time.monotonic()
            try:
                inputs = self._inputs(requests)
                num_prompt = inputs["input_ids"].shape[1]
                ends = _Ends(requests, self.tokenizer, num_prompt, cancelled)
                ids = self.model.generate(
                    **inputs,
                    generation_config=self._generation_config(requests),
                    logits_processor=LogitsProcessorList([_RowSampler(requests, self.model.device)]),
                    stopping_criteria=StoppingCriteriaList([ends]),
                    streamer=streamer,
                )
            finally:
                self._busy_since = None
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        rows = ids[:, num_prompt:].tolist()
        return [
            self._read(request, row, ends.at[index], lengths[index])
            for index, (request, row) in enumerate(zip(requests, rows, strict=True))
        ]

    def _inputs(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        """Left-padded prompts [B, T] and the ragged windows [S, 160000] of all clips [C]."""
        counts = [len(request.clips) for request in requests]
        text = encode(
            self.tokenizer,
            [request.prompt for request in requests],
            max_tokens=self.max_prompt_tokens,
            num_audios=counts,
            padding_side="left",
        )
        inputs = {"input_ids": text.input_ids, "attention_mask": text.attention_mask}
        clips = [clip for request in requests for clip in request.clips]
        if clips:
            audio_index = np.full((len(requests), max(counts)), -1, np.int64)
            audio_index[np.arange(max(counts)) < np.array(counts)[:, None]] = np.arange(len(clips))
            inputs |= {
                "waveforms": np.concatenate(clips),
                "windows_per_clip": np.array([len(clip) for clip in clips], np.int64),
                "audio_index": audio_index,
            }
        return {key: torch.from_numpy(value).to(self.model.device) for key, value in inputs.items()}

    def _generation_config(self, requests: Sequence[Request]) -> GenerationConfig:
        """Greedy as far as `generate` knows: sampling is the row sampler's."""
        return GenerationConfig(
            max_new_tokens=max(request.max_new_tokens for request in requests),
            max_time=self.max_time_s,
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted(self._end_ids()),
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def _end_ids(self) -> set[int]:
        ids = {self.tokenizer.convert_tokens_to_ids(END_OF_CHUNK), self.tokenizer.eos_token_id}
        return {token for token in ids if token is not None}

    def _read(self, request: Request, row: list[int], end: int | None, num_prompt: int) -> Answer:
        """The answer in the generated ids of one row, which other rows may have outlived."""
        row = row[:end]
        stopped = next((index for index, token in enumerate(row) if token in self._end_ids()), None)
        kept = row if stopped is None else row[: stopped + 1]
        cutter = _StopCutter(request.stop)
        text = cutter.feed(str(self.tokenizer.decode(kept, skip_special_tokens=True))) + cutter.rest()
        reason: FinishReason = "stop" if stopped is not None or cutter.found else "length"
        return Answer(text, reason, prompt_tokens=num_prompt, completion_tokens=len(kept))


def _local(folder: str, scratch: Path) -> str:
    """A local path of the model folder, fetched if it is remote."""
    if "://" in folder:
        fs, path = fsspec.url_to_fs(folder)
        fs.get(path.rstrip("/") + "/", str(scratch), recursive=True)
        folder = str(scratch)
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"no model in {folder!r}: name the folder that an export wrote, the one with config.json")
    return folder


class _RowSampler(LogitsProcessor):
    """Samples each row with its own temperature, top-p and generator, and leaves only the chosen token.

    Greedy decoding then takes it: `generate` itself has one setting and one generator for the whole batch.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self._rows: list[tuple[int, Request, torch.Generator]] = []
        for index, request in enumerate(requests):
            if request.temperature > 0:
                generator = torch.Generator(device)
                if request.seed is None:
                    generator.seed()
                else:
                    generator.manual_seed(request.seed)
                self._rows.append((index, request, generator))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not self._rows:
            return scores
        chosen_only = scores.clone()
        for index, request, generator in self._rows:
            chosen = _sample(scores[index].float(), request.temperature, request.top_p, generator)
            chosen_only[index] = -torch.inf
            chosen_only[index, chosen] = 0.0
        return cast(torch.FloatTensor, chosen_only)


def _sample(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> torch.Tensor:
    """One token of logits [V]: the smallest set of tokens whose probabilities reach `top_p`, then by chance."""
    probs, order = torch.softmax((logits - logits.max()) / temperature, dim=-1).sort(descending=True)
    outside = probs.cumsum(dim=-1) - probs >= top_p
    return order[torch.multinomial(probs.masked_fill(outside, 0.0), 1, generator=generator)]


class _Ends(StoppingCriteria):
    """Ends each row at its own length, at its stop strings, or all at a cancellation; remembers where."""

    def __init__(
        self,
        requests: Sequence[Request],
        tokenizer: PreTrainedTokenizerBase,
        num_prompt: int,
        cancelled: threading.Event | None,
    ) -> None:
        self._requests, self._tokenizer, self._num_prompt = requests, tokenizer, num_prompt
        self._cancelled = cancelled
        self.at: list[int | None] = [None] * len(requests)
        """Number of tokens a row was ended at; none while it was not ended here."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        num_new = input_ids.shape[1] - self._num_prompt
        cancelled = self._cancelled is not None and self._cancelled.is_set()
        for index, request in enumerate(self._requests):
            over = num_new >= request.max_new_tokens or cancelled
            if self.at[index] is None and (over or self._at_stop(request, input_ids[index])):
                self.at[index] = num_new
        return torch.tensor([end is not None for end in self.at], device=input_ids.device)

    def _at_stop(self, request: Request, ids: torch.Tensor) -> bool:
        """Whether a stop string has just been written: each token is at least a byte, so a short tail tells."""
        if not request.stop:
            return False
        tail = max(len(stop.encode()) for stop in request.stop) + 1
        text = str(self._tokenizer.decode(ids[self._num_prompt :][-tail:], skip_special_tokens=True))
        return any(stop in text for stop in request.stop)


class _StopCutter:
    """Passes text on up to the first stop string, holding back what may yet become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """The text that is safe to pass on now."""
        if self.found:
            return ""
        text = self._held + piece
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
