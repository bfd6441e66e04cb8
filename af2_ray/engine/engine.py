"""Continuous batching on one device: answers join and leave between two tokens; knows nothing of Ray, HTTP or threads.

Each step encodes a few windows of audio, reads a few prompts into free slots, and writes one token of every running
answer. Encoding and reading have budgets, so running answers wait for a bounded time, whatever comes in; the shortest
recording is encoded first. Every answer has its own sampling, seed, stop strings and length, and does not depend on
what shares its steps (up to rounding: sums in a larger matrix product run in another order). What was heard stays in
a byte-bounded memory, so a further question about a clip starts with its prompt.

The life of a request: waiting (for memory) -> admitted (its clips are being encoded) -> running (a slot) -> answered.
Owners take turns at each of these doors (`turns`), so whoever asks for much waits for it alone.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from af2_ray.audio.windows import WINDOW_S
from af2_ray.config import Serve
from af2_ray.engine.admission import Admission
from af2_ray.engine.audio_attention import Projection
from af2_ray.engine.audio_memory import AudioMemory
from af2_ray.engine.counts import Counts
from af2_ray.engine.decoder import Decoder
from af2_ray.engine.encoder import Encoder
from af2_ray.engine.graph import Recorder
from af2_ray.engine.health import Health, answer_silence
from af2_ray.engine.loading import load
from af2_ray.engine.request import Answer, Event, Piece, Request, RequestFailure
from af2_ray.engine.sampling import choose, logprobs_of
from af2_ray.engine.ticket import Emit, Ticket
from af2_ray.engine.turns import in_turn, owners_of
from af2_ray.engine.warm import warm_up
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration
from af2_ray.models.parts import Base
from af2_ray.text import END_OF_CHUNK, encode_conversations

logger = logging.getLogger(__name__)

_FAILED = RequestFailure("the model failed on this request; the log has the reason", by_caller=False)
_CANCELLED = RequestFailure("the request was cancelled", by_caller=True)
_ENCODE_WINDOWS = {"cpu": 2, "cuda": 32}
_TEXT_TOKENS = 512  # that a slot has room for at first, of a model that does not tell what it was trained on


class Engine:
    """A model and its tokenizer, ready to answer. Not safe to call from several threads (`runner.Runner` is)."""

    def __init__(
        self,
        model: AudioFlamingo2ForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        settings: Serve | None = None,
        *,
        max_windows: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Make the caches and slots of a model.

        Args:
            max_windows: windows of the longest clip; none: those of the longest that the model was trained on.
            recorder: what records the steps of writing; none: what the device has, if anything.
        """
        self.model, self.tokenizer, self.settings = model.eval(), tokenizer, settings or Serve()
        self.max_windows = max_windows or int(model.config.max_windows)
        self.counts = Counts()
        self._positions = int(model.config.text_config.max_position_embeddings)  # of text; a prefix comes on top
        self._projection = project = Projection(model)
        num_slots, budget = self.settings.num_slots, self.settings.encode_windows
        limit, keep_s = self.settings.audio_memory_mb * 2**20, self.settings.keep_audio_s
        self.memory = AudioMemory(project, project.states_bytes, project.projected_bytes, limit, keep_s)
        self.health = Health(self.settings.max_failed_steps)
        self.encoder = Encoder(model, _ENCODE_WINDOWS.get(model.device.type, 8) if budget == "auto" else budget)
        room = (model.config.max_text_tokens or _TEXT_TOKENS) + self.settings.max_new_tokens
        self._decoder = Decoder(
            model, project, num_slots=num_slots, room=room, max_windows=self.max_windows, recorder=recorder
        )
        self.graphs = self._decoder.graphs
        """Recordings of the step that writes a token; none: it is launched anew each time."""
        ends = {tokenizer.convert_tokens_to_ids(END_OF_CHUNK), tokenizer.eos_token_id}
        self._ends: set[int] = {end for end in ends if end is not None}
        self._end_ids = torch.tensor(sorted(self._ends), device=model.device)
        self._admission = Admission(self.memory, self.encoder, num_slots)
        self._running: list[Ticket] = []  # by row of the decoder

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        device: str = "auto",
        settings: Serve | None = None,
        *,
        max_windows: int | None = None,
        base: Base | None = None,
    ) -> Engine:
        """Load a model (`loading.load`): an export, or a small part of `base`, whose tensors it shares."""
        model, tokenizer = load(folder, device, base)
        return cls(model, tokenizer, settings, max_windows=max_windows)

    # --- What callers see ----------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Answers being written."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._admission.waiting) + len(self._admission.admitted)

    @property
    def num_windows(self) -> int:
        """Audio windows of all requests that have no answer yet: the load that replicas are added for."""
        return sum(sum(ticket.clips.values()) for ticket in self._tickets())

    def submit(self, request: Request, emit: Emit) -> Ticket:
        """Take a request; `emit` gets its pieces, and at last an `Answer` or a `RequestFailure` (perhaps at once)."""
        ids = self._read_prompt(request)
        if isinstance(ids, RequestFailure):
            ticket = Ticket(request, emit, [], self.tokenizer, self.model.device)
            self._end(ticket, ids)
            return ticket
        left = self._positions - len(ids)  # an answer ends where the LM has no position left
        request = replace(request, max_new_tokens=min(request.max_new_tokens, left))
        ticket = Ticket(request, emit, ids, self.tokenizer, self.model.device)
        self._admission.waiting.append(ticket)
        return ticket

    @torch.inference_mode()
    def step(self) -> bool:
        """Encode, read and write one token of every running answer; whether anything is left to do."""
        self.counts.steps += 1
        self._drop()
        for ticket, failure in self._admission.admit(self._running).items():
            self._end(ticket, failure)
        self._encode()
        self._begin()
        self._go_on()
        self.memory.forget_old()
        self.health.note_work("the engine")
        self.end_step()
        return bool(self._admission.waiting or self._admission.admitted or self._running)

    def answer(self, requests: Sequence[Request]) -> list[Answer | RequestFailure]:
        """Answer all requests, in order; one that cannot be answered never takes the others with it."""
        results: dict[int, Answer | RequestFailure] = {}

        def keep(index: int, event: Event) -> None:
            if not isinstance(event, Piece):
                results[index] = event

        for index, request in enumerate(requests):
            self.submit(request, partial(keep, index))
        while self.step():
            pass
        return [results[index] for index in range(len(requests))]

    def stream(self, request: Request) -> Iterator[Event]:
        """Answer one request piece by piece; the last item is the whole `Answer`, or a `RequestFailure`."""
        events: deque[Event] = deque()
        ticket = self.submit(request, events.append)
        try:
            while True:
                while events:
                    event = events.popleft()
                    yield event
                    if not isinstance(event, Piece):
                        return
                self.step()
        finally:
            ticket.cancel()

    def end_step(self) -> None:
        """Count what failed in a step; if that is suspicious, see whether anything works at all (`health`)."""
        if self.health.end_step() and len(self._running) < self.settings.num_slots:
            try:
                self.ask_itself()
            except Exception as error:  # whatever the model raises
                logger.exception("the engine cannot answer a question of its own either")
                self.health.judge(error)
            else:
                self.health.judge(None)

    @torch.inference_mode()
    def ask_itself(self) -> None:
        """Answer a question of its own, with a token, in a free slot.

        Raises:
            Exception: whatever keeps the engine from answering anything.
        """
        answer_silence(self.encoder, self._projection, self._decoder, self.tokenizer)

    @torch.inference_mode()
    def warm(self) -> None:
        """Do once what is slow the first time, before anybody waits for it; on a CPU no more than `ask_itself`.

        Raises:
            Exception: whatever keeps the engine from answering anything.
        """
        self.ask_itself()
        if self.graphs is not None:
            most_bytes = self.settings.audio_memory_mb * 2**20 // 2
            warm_up(self.encoder, self._projection, self._decoder, self.tokenizer, self.max_windows, most_bytes)

    def forget(self, keys: Sequence[str]) -> int:
        """Forget recordings, those in use when their last answer ends; how many clips were kept of them."""
        return self._admission.forget(keys)

    def fail_all(self) -> None:
        """Give every request up, as failed."""
        for ticket in self._admission.waiting:
            self._end(ticket, _FAILED)
        self._admission.waiting.clear()
        for ticket in list(self._admission.admitted):
            self._leave(ticket, _FAILED)
        self._free(dict.fromkeys(self._running, _FAILED))

    def close(self) -> None:
        """Give every request up, and the device's memory as soon as nobody holds the engine; it answers no more."""
        self.fail_all()
        self._decoder.close()

    # --- Taking requests -----------------------------------------------------------------------------------------

    def _tickets(self) -> tuple[Ticket, ...]:
        return (*self._admission.waiting, *self._admission.admitted, *self._running)

    def _read_prompt(self, request: Request) -> list[int] | RequestFailure:
        """The prompt's tokens, or what is wrong with the request, found before it can share a step."""
        longest = self.max_windows
        if faults := [fault for clip in request.clips if (fault := clip.fault(longest))]:
            return RequestFailure(faults[0], by_caller=True)
        if self._projection.is_prefix and sum(clip.num_windows for clip in request.clips) > longest:
            return RequestFailure(f"this model hears {longest * WINDOW_S} s of audio in all: send less", by_caller=True)
        if not 1 <= request.max_new_tokens <= self.settings.max_new_tokens:
            limit = self.settings.max_new_tokens
            return RequestFailure(f"max_new_tokens={request.max_new_tokens} is not within 1 to {limit}", by_caller=True)
        limit = min(self.settings.max_prompt_tokens, self._positions - 1)
        try:
            text = encode_conversations(self.tokenizer, [request.messages], max_tokens=limit)
        except ValueError as error:
            return RequestFailure(str(error), by_caller=True)
        if text.num_truncated:
            return RequestFailure(f"the prompt is longer than {limit} tokens: shorten it", by_caller=True)
        ids = [int(token) for token in text.input_ids[0]]
        trained = self.model.config.max_text_tokens
        if trained and len(ids) > trained:
            logger.warning("%s: a prompt of %d tokens; the model was trained on %d", request.id, len(ids), trained)
        return ids

    def _drop(self) -> None:
        """End what was cancelled or took too long."""
        limit_s = self.settings.request_timeout_s
        late = RequestFailure(
            f"no answer within {limit_s:g} s: send less audio or ask for fewer tokens", by_caller=False
        )
        now = time.monotonic()
        ended = {
            ticket: _CANCELLED if ticket.cancelled else late
            for ticket in self._tickets()
            if ticket.cancelled or now - ticket.since > limit_s
        }
        if not ended:
            return
        for ticket in [ticket for ticket in self._admission.waiting if ticket in ended]:
            self._admission.waiting.remove(ticket)
            self._end(ticket, ended[ticket])
        for ticket in [ticket for ticket in self._admission.admitted if ticket in ended]:
            self._leave(ticket, ended[ticket])
        self._free(ended)

    # --- The three parts of a step -------------------------------------------------------------------------------

    def _encode(self) -> None:
        num_before, has_failed = self.encoder.num_encoded, False
        for key, states in self.encoder.step().items():
            if isinstance(states, Tensor):
                self.memory.put(key, states, len(states) // self._projection.tokens_per_window)
                continue
            has_failed = True
            self.health.note_failure("encoding", states)
            for ticket in [ticket for ticket in self._admission.admitted if key in ticket.clips]:
                self._leave(ticket, _FAILED)
        if self.encoder.num_encoded > num_before and not has_failed:
            self.health.note_work("encoding")

    def _begin(self) -> None:
        """Read the prompts of requests whose clips are there, owners by turns, as far as slots and the budget go."""
        room, budget = self.settings.num_slots - len(self._running), self.settings.prefill_tokens
        if not room or not self._admission.admitted:
            return
        writing, limit = owners_of(self._running), self.settings.answers_per_key
        batch: list[Ticket] = []
        for ticket in in_turn(self._admission.ready(), writing):
            owner = ticket.request.owner
            if limit and owner and writing[owner] >= limit:  # nobody's requests are many people's: no bound for them
                continue
            budget -= len(ticket.ids)
            if batch and budget < 0:
                break
            writing[owner] += 1
            batch.append(ticket)
            if len(batch) == room:
                break
        if batch:
            self._prefill(batch)

    def _prefill(self, batch: list[Ticket]) -> None:
        """Prefill together; if that fails, each alone, so that the one at fault fails alone (memory, for instance)."""
        try:
            clips = [[(clip.key, self.memory.projected(clip.key)) for clip in t.request.clips] for t in batch]
            max_new = [ticket.request.max_new_tokens for ticket in batch]
            logits = self._decoder.prefill([ticket.ids for ticket in batch], clips, max_new)
            self.memory.reserve(self._decoder.audio_bytes)
        except Exception as error:  # the model may raise anything; it is logged, and the caller gets an answer
            self.health.note_failure("reading", error)
            logger.exception("prompts of %s failed", [ticket.request.id for ticket in batch])
            if len(batch) == 1:
                self._leave(batch[0], _FAILED)
            else:
                for ticket in batch:
                    self._prefill([ticket])
            return
        for ticket in batch:
            self._admission.admitted.remove(ticket)
        self.counts.prompt_tokens += sum(len(ticket.ids) for ticket in batch)
        self._running += batch
        self._advance("reading", batch, logits)

    def _go_on(self) -> None:
        """One token of every running answer."""
        if not self._running:
            return
        self.counts.decode_steps += 1
        self.counts.rows += len(self._running)
        try:
            logits = self._decoder.decode([ticket.token for ticket in self._running])
        except Exception as error:  # as for prompts; nobody can say which row is at fault
            self.health.note_failure("writing", error)
            logger.exception("a step of %s failed", [ticket.request.id for ticket in self._running])
            self._free(dict.fromkeys(self._running, _FAILED))
            return
        self._advance("writing", list(self._running), logits)

    def _advance(self, part: str, tickets: list[Ticket], logits: Tensor) -> None:
        """Choose the next token of running rows of logits [B, V], pass text on, free the slots of what is done."""
        samplers = [ticket.sampler for ticket in tickets]
        chosen = choose(logits, samplers, [ticket.must_go_on for ticket in tickets], self._end_ids)
        if any(token is not None for token in chosen):
            self.health.note_work(part)
        else:
            self.health.note_failure(part, ArithmeticError("the logits are not numbers"))
        new = {row: token for row, token in enumerate(chosen) if token is not None and token not in self._ends}
        nums_top = {row: num for row in new if (num := tickets[row].request.top_logprobs) is not None}
        logprobs = logprobs_of(logits, new, nums_top, self.tokenizer)
        ended: dict[Ticket, Answer | RequestFailure] = {}
        for row, (ticket, token) in enumerate(zip(tickets, chosen, strict=True)):
            if token is None:
                logger.error("the logits of %s are not numbers", ticket.request.id)
                ended[ticket] = _FAILED
                continue
            self.counts.new_tokens += 1
            if answer := ticket.take(token, token in self._ends, logprobs.get(row)):
                ended[ticket] = answer
        self._free(ended)

    # --- Ends ----------------------------------------------------------------------------------------------------

    def _free(self, ended: Mapping[Ticket, Answer | RequestFailure]) -> None:
        """End running answers (others are passed over) and close the gaps they leave."""
        for row in range(len(self._running) - 1, -1, -1):
            ticket = self._running[row]
            if ticket in ended:
                self._decoder.remove(row)
                last = self._running.pop()
                if last is not ticket:
                    self._running[row] = last
                self.memory.unpin(ticket.clips)
                self._end(ticket, ended[ticket])

    def _leave(self, ticket: Ticket, result: RequestFailure) -> None:
        """End an admitted request."""
        self._admission.let_go(ticket)
        self._end(ticket, result)

    def _end(self, ticket: Ticket, result: Answer | RequestFailure) -> None:
        if isinstance(result, Answer):
            self.counts.answers += 1
        else:
            self.counts.failures += 1
        ticket.tell(result)
