"""Answers of an exported model to many questions, each clip decoded and encoded once.

Encoding is most of the cost (22 ms a 10 s window and thread with the smallest tower), so the audio states of every clip
are kept on the CPU and serve all its questions and, for the deaf control, questions about other clips.
The price is memory: 64 x D numbers a window, 50 MB for 1100 windows of the smallest model, 290 MB at D = 2048 in bf16.
With Ray the clips, then the batches of questions, are dealt out to a few actors that load the model once each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from af2_ray.audio.decode import AudioError, decode, probe
from af2_ray.audio.windows import WINDOW_S, num_windows_for, to_windows
from af2_ray.data.manifest import Sample, check_samples
from af2_ray.data.quarantine import Failure
from af2_ray.evaluate.answers import Clip, Prediction, clip_of
from af2_ray.models.audio_states import AudioStates
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration
from af2_ray.remote import local_model
from af2_ray.storage import is_remote
from af2_ray.text import END_OF_CHUNK, encode

log = logging.getLogger(__name__)

States = dict[Clip, torch.Tensor]
"""Audio states [A, D] of each clip, on the CPU, without padding."""

_ANSWER_WINDOWS = 4  # a batch of answers may hold this many times `batch_windows`: its cost is K/V, not the tower
_MAX_QUESTIONS = 64


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt put over a clip; `deaf`: not the clip that the question is about."""

    index: int
    prompt: str
    clip: Clip
    num_windows: int
    deaf: bool


Answers = dict[tuple[int, bool], str]
"""The text answered to question (index, deaf)."""


def load_model(
    model_dir: str | Path, *, device: str | None = None
) -> tuple[AudioFlamingo2ForConditionalGeneration, PreTrainedTokenizerBase]:
    """An exported model in evaluation mode, and its tokenizer.

    Args:
        model_dir: Hugging Face folder as a stage exports it, local or remote.
        device: none: the GPU where there is one.

    Raises:
        ValueError: no model folder.
    """
    local = local_model(model_dir)
    model = AudioFlamingo2ForConditionalGeneration.from_pretrained(local)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(where).eval(), AutoTokenizer.from_pretrained(local)


# --- Encoding ------------------------------------------------------------------------------------------------------


def encode_clips(
    model: AudioFlamingo2ForConditionalGeneration, clips: Sequence[Clip], *, max_windows: int, batch_windows: int
) -> tuple[States, list[Failure]]:
    """Audio states of each clip (its first `max_windows` windows), and the clips that failed.

    `batch_windows` are encoded at a time; a clip of more goes alone. Clips may be longer than any that the model was
    trained on: what it makes of them is what an evaluation asks.
    """
    model.config.max_windows = max(model.config.max_windows, max_windows)
    states: States = {}
    failures: list[Failure] = []
    batch: dict[Clip, NDArray[np.int16]] = {}
    for clip in clips:
        try:
            windows = read_windows(*clip, max_windows=max_windows)
        except AudioError as error:
            failures.append(Failure(error.uri, error.reason, clip[1], error.detail))
            continue
        if batch and sum(map(len, batch.values())) + len(windows) > batch_windows:
            states |= _encode_batch(model, batch)
            batch = {}
        batch[clip] = windows
    if batch:
        states |= _encode_batch(model, batch)
    return states, failures


def read_windows(
    uri: str, offset_s: float, duration_s: float, *, max_windows: int, allow_silent: bool = False
) -> NDArray[np.int16]:
    """int16 windows [W, 160000] of a clip; reads no more of the file than they hold.

    Raises:
        AudioError: it cannot be used; silence too, unless it is allowed.
    """
    heard_s = min(duration_s, float(max_windows * WINDOW_S))
    return to_windows(decode(uri, offset_s, heard_s, allow_silent=allow_silent), max_windows)


@torch.inference_mode()
def _encode_batch(model: AudioFlamingo2ForConditionalGeneration, batch: Mapping[Clip, NDArray[np.int16]]) -> States:
    waveforms = torch.from_numpy(np.concatenate(list(batch.values()))).to(model.device)
    windows_per_clip = torch.tensor([len(windows) for windows in batch.values()], device=model.device)
    encoded = model.encode_audio(waveforms, windows_per_clip)
    rows = zip(batch, encoded.hidden, encoded.mask, strict=True)
    return {clip: hidden[mask.bool()].cpu().clone() for clip, hidden, mask in rows}


# --- Answering -----------------------------------------------------------------------------------------------------


def answer_batch(
    model: AudioFlamingo2ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    asks: Sequence[Ask],
    states: States,
    *,
    max_new_tokens: int,
) -> Answers:
    """Greedy answers to one batch of questions; their clips are padded to the longest of the batch."""
    clips = list(dict.fromkeys(ask.clip for ask in asks))
    hidden = torch.nn.utils.rnn.pad_sequence([states[clip] for clip in clips], batch_first=True)
    lengths = torch.tensor([len(states[clip]) for clip in clips])
    audio = AudioStates(hidden.to(model.device), (torch.arange(hidden.shape[1]) < lengths[:, None]).to(model.device))
    text = encode(tokenizer, [ask.prompt for ask in asks], padding_side="left")
    ends = [tokenizer.convert_tokens_to_ids(END_OF_CHUNK), tokenizer.eos_token_id]
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=torch.from_numpy(text.input_ids).to(model.device),
            attention_mask=torch.from_numpy(text.attention_mask).to(model.device),
            audio_states=audio,
            audio_index=torch.tensor([[clips.index(ask.clip)] for ask in asks], device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=[token for token in ends if token is not None],
            pad_token_id=tokenizer.pad_token_id,
        )
    texts = tokenizer.batch_decode(tokens[:, text.input_ids.shape[1] :])
    return {(a.index, a.deaf): clean_answer(t, tokenizer) for a, t in zip(asks, texts, strict=True)}


def clean_answer(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Generated text up to its first special token."""
    for token in tokenizer.all_special_tokens:
        text = text.split(token, 1)[0]
    return text.strip()


def plan_asks(
    samples: Sequence[Sample], deaf_of: Mapping[int, int], usable: set[Clip], *, max_windows: int, batch_windows: int
) -> list[list[Ask]]:
    """All questions, with their own clip and with the deaf one, in batches of like audio and text length."""
    asks = []
    for index, sample in enumerate(samples):
        heard = [(sample, False)] + ([(samples[deaf_of[index]], True)] if index in deaf_of else [])
        for source, deaf in heard:
            if clip_of(sample) in usable and clip_of(source) in usable:
                windows = num_windows_for(source.duration_s, max_windows)
                asks.append(Ask(index, sample.prompt, clip_of(source), windows, deaf))
    asks.sort(key=lambda ask: (ask.num_windows, len(ask.prompt), ask.index))
    return list(_fill(asks, _ANSWER_WINDOWS * batch_windows))


def _fill(asks: Sequence[Ask], most_windows: int) -> Iterator[list[Ask]]:
    batch: list[Ask] = []
    for ask in asks:  # ascending, so the newest is the longest
        if batch and (len(batch) == _MAX_QUESTIONS or (len(batch) + 1) * ask.num_windows > most_windows):
            yield batch
            batch = []
        batch.append(ask)
    if batch:
        yield batch


# --- Whole manifests -----------------------------------------------------------------------------------------------


def predict(
    model: AudioFlamingo2ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    max_windows: int = 30,
    batch_windows: int = 32,
    max_new_tokens: int = 24,
    deaf_of: Mapping[int, int] | None = None,
) -> tuple[list[Prediction], list[Failure]]:
    """Answer every question, in this process.

    Args:
        samples: the questions.
        max_windows: windows heard of a clip; the rest is not read.
        batch_windows: windows encoded at a time.
        max_new_tokens: length limit of an answer.
        deaf_of: for a question's index the index of the sample whose clip is played for the deaf answer.

    Returns:
        Predictions in the order of `samples`, and what was set aside: questions that cannot be used and clips that
        cannot be read have no prediction, and a question whose deaf clip cannot be read has no deaf answer.
    """
    deaf_of = deaf_of or {}
    clips, failures = _clips(samples, max_windows)
    states, unread = encode_clips(model, clips, max_windows=max_windows, batch_windows=batch_windows)
    batches = plan_asks(samples, deaf_of, set(states), max_windows=max_windows, batch_windows=batch_windows)
    answers: Answers = {}
    for batch in batches:
        answers |= answer_batch(model, tokenizer, batch, states, max_new_tokens=max_new_tokens)
    return _collect(samples, answers, deaf_of), failures + unread


def answer_one(
    model: AudioFlamingo2ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    uri: str,
    question: str,
    *,
    max_windows: int = 30,
    max_new_tokens: int = 64,
) -> str:
    """The answer to one question about one recording, from its beginning to at most `max_windows` windows.

    Raises:
        ValueError: an empty question.
        AudioError: the recording cannot be used.
    """
    if not question.strip():
        raise ValueError("the question is empty: ask something")
    clip = (uri, 0.0, probe(uri))
    states = _encode_batch(model, {clip: read_windows(*clip, max_windows=max_windows, allow_silent=True)})
    ask = Ask(0, question, clip, max_windows, deaf=False)
    return answer_batch(model, tokenizer, [ask], states, max_new_tokens=max_new_tokens)[0, False]


class Listener:
    """One actor of `predict_on_ray`: a loaded model, one thread."""

    def __init__(self, model_dir: str, num_threads: int, device: str) -> None:
        torch.set_num_threads(num_threads)
        self.model, self.tokenizer = load_model(model_dir, device=device)

    def encode(self, clips: Sequence[Clip], max_windows: int, batch_windows: int) -> tuple[States, list[Failure]]:
        """`encode_clips` with this actor's model."""
        return encode_clips(self.model, clips, max_windows=max_windows, batch_windows=batch_windows)

    def answer(self, batches: Sequence[Sequence[Ask]], max_new_tokens: int, *shards: States) -> Answers:
        """`answer_batch` over `batches`; `shards` together hold the states of all clips."""
        states: States = {}
        for shard in shards:
            states |= shard
        answers: Answers = {}
        for batch in batches:
            answers |= answer_batch(self.model, self.tokenizer, batch, states, max_new_tokens=max_new_tokens)
        return answers


def predict_on_ray(
    model_dir: str | Path,
    samples: Sequence[Sample],
    *,
    num_shards: int,
    max_windows: int = 30,
    batch_windows: int = 32,
    max_new_tokens: int = 24,
    deaf_of: Mapping[int, int] | None = None,
    cpus_per_shard: float = 1.0,
    gpus_per_shard: float = 0.0,
    threads_per_shard: int = 1,
) -> tuple[list[Prediction], list[Failure]]:
    """`predict`, spread over `num_shards` actors of the Ray cluster that is connected; the same answers.

    Clips are dealt out by length, then the batches of questions; each actor gets the states of all clips.
    """
    import ray

    deaf_of = deaf_of or {}
    clips, failures = _clips(samples, max_windows)
    place = str(model_dir if is_remote(model_dir) else Path(model_dir).absolute())
    actor_class = ray.remote(num_cpus=cpus_per_shard, num_gpus=gpus_per_shard)(Listener)
    device = "cuda" if gpus_per_shard else "cpu"  # Ray leaves GPUs in sight of an actor that has none
    actors = [actor_class.remote(place, threads_per_shard, device) for _ in range(num_shards)]
    try:
        encoded = [
            actor.encode.options(num_returns=2).remote(clips[shard::num_shards], max_windows, batch_windows)
            for shard, actor in enumerate(actors)
        ]
        unread = [failure for _, failed in encoded for failure in ray.get(failed)]
        bad = {(failure.uri, failure.offset_s) for failure in unread}
        usable = {clip for clip in clips if clip[:2] not in bad}
        batches = plan_asks(samples, deaf_of, usable, max_windows=max_windows, batch_windows=batch_windows)
        shards = [states for states, _ in encoded]
        answered = [
            actor.answer.remote(batches[shard::num_shards], max_new_tokens, *shards)
            for shard, actor in enumerate(actors)
        ]
        answers: Answers = {}
        for part in ray.get(answered):
            answers |= part
    finally:
        for actor in actors:
            ray.kill(actor)
    return _collect(samples, answers, deaf_of), failures + unread


def _clips(samples: Sequence[Sample], max_windows: int) -> tuple[list[Clip], list[Failure]]:
    """The distinct clips of the usable samples, long ones first, and the samples that cannot be used."""
    good, bad = check_samples(samples)
    failures = [Failure(sample.uri, reason, sample.offset_s, sample.id) for sample, reason in bad]
    clips = sorted({clip_of(s) for s in good}, key=lambda clip: (-num_windows_for(clip[2], max_windows), clip))
    log.info("%d questions over %d clips, %d windows", len(good), len(clips), _num_windows(clips, max_windows))
    return clips, failures


def _num_windows(clips: Sequence[Clip], max_windows: int) -> int:
    return sum(num_windows_for(duration_s, max_windows) for _, _, duration_s in clips)


def _collect(samples: Sequence[Sample], answers: Answers, deaf_of: Mapping[int, int]) -> list[Prediction]:
    return [
        Prediction(
            sample,
            answers[index, False],
            answers.get((index, True)),
            samples[deaf_of[index]].uri if (index, True) in answers else None,
        )
        for index, sample in enumerate(samples)
        if (index, False) in answers
    ]
