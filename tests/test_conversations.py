"""Conversations and several recordings: training sees the tokens that the server answers to, and learns each answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serve_toy
import torch
from transformers import AutoProcessor, AutoTokenizer

from af2_ray.audio.hear import Stretch, hear
from af2_ray.config import Budget, Evaluation, Serve
from af2_ray.data.batching import Row, plan_epoch, text_lengths, window_counts
from af2_ray.data.collate import LmCollator
from af2_ray.data.columns import Joined, SampleTable, clip_numbers, durations
from af2_ray.data.samples import Sample, Turn, messages_of
from af2_ray.engine import batch
from af2_ray.engine.engine import Engine
from af2_ray.engine.request import Answer, Clip, Request
from af2_ray.evaluate.predict import predict
from af2_ray.models.processing_af2 import AudioFlamingo2FeatureExtractor, AudioFlamingo2Processor
from af2_ray.text import (
    CHAT_TEMPLATE,
    IGNORE,
    Message,
    encode,
    encode_conversations,
    format_prompt,
    known_template,
    render,
    template_of,
)
from serve_apps.limits import Limits
from serve_apps.schemas import ChatRequest

SYSTEM = CHAT_TEMPLATE.replace("namespace(text='')", "namespace(text='you hear sounds.')")
OLD_DEFAULT = (
    "{%- for message in messages -%}"
    "{%- if message.content is string -%}{{ message.content | trim | lower }}"
    "{%- else -%}"
    "{%- for part in message.content if part.type in ['audio', 'input_audio'] -%}<audio>{%- endfor -%}"
    "{%- for part in message.content if part.type == 'text' -%}"
    "{{ part.text | trim | lower }}{%- if not loop.last %} {% endif -%}{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message.role == 'assistant' -%}<|endofchunk|>{{ eos_token }}{%- else -%}<SEP>{%- endif -%}"
    "{%- endfor -%}"
)
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SECONDS = (4.0, 14.0, 25.0)
MAX_WINDOWS = 2


@pytest.fixture(scope="module", params=["default", "system"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A model folder, with the default chat template or one that has a system prompt."""
    folder = serve_toy.export(tmp_path_factory.mktemp("model"), tiny_tokenizer)
    AudioFlamingo2Processor(AudioFlamingo2FeatureExtractor(3), tiny_tokenizer).save_pretrained(folder)
    if request.param == "system":
        (folder / "chat_template.jinja").write_text(SYSTEM + "\n")
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.from_pretrained(str(folder), "cpu", Serve(num_slots=2))


@pytest.fixture
def files(make_sound: Callable[..., str]) -> list[str]:
    return [make_sound(f"{n}.flac", seconds, hz=200 + 150 * n) for n, seconds in enumerate(SECONDS)]


def sample(name: str, files: list[str], *turns: tuple[str, str], recordings: tuple[int, ...] = (0,)) -> Sample:
    first, *more = (Stretch(files[number], 0.0, SECONDS[number]) for number in recordings)
    *history, last = (Turn(*turn) for turn in turns)
    return Sample(
        *(name, first.uri, first.offset_s, first.duration_s, last.prompt, last.answer, "AQA", "d"),
        history=tuple(history),
        more_audio=tuple(more),
    )


def samples_of(files: list[str]) -> dict[str, Sample]:
    ask, again, last = ("Which sound? ", " A Bell"), ("How often?", "twice"), ("Is it loud?", "no, it is not.")
    return {
        "one turn": sample("1", files, ask),
        "three turns": sample("3", files, ask, again, last),
        "two recordings": sample("2", files, ("Which is longer?", "the second"), recordings=(0, 1)),
        "two recordings, placed": sample(
            "p", files, ("Is <audio> before <audio> longer?", "no"), again, recordings=(0, 1)
        ),
        "one more with a later question": sample(
            "l", files, ("<audio>Which sound?", "a bell"), again, (" <Audio>\nand here?", "a drum"), recordings=(0, 2)
        ),
        "markers at the beginning": sample(
            "b", files, ("<audio> <audio>\nWhich is longer?", "the second"), recordings=(0, 1)
        ),
    }


def asked(sample: Sample, num_answers: int) -> dict[str, Any]:
    """The body that asks the server for the answer that comes after so many."""
    messages: list[dict[str, Any]] = []
    for message in messages_of(sample)[: 2 * num_answers + 1]:
        parts = [serve_toy.audio_part(serve_toy.wav())] * message.num_audios
        messages.append({"role": message.role, "content": [*parts, message.text] if parts else message.text})
    return {"model": "af2", "messages": messages}


def request_of(body: dict[str, Any]) -> Request:
    """What the engine gets of a body."""
    chat = ChatRequest.model_validate(body)
    clips = [Clip(f"clip {number}", 1) for number in range(len(chat.audios()))]
    return Limits.of(Serve()).to_engine(chat, "id", clips)[0]


def prompt_ids(engine: Engine, request: Request) -> list[int]:
    return engine.submit(request, lambda event: None).ids


@pytest.mark.parametrize("kind", samples_of(["0", "1", "2"]))
def test_training_sees_the_tokens_that_the_server_would(engine: Engine, files: list[str], kind: str) -> None:
    one = samples_of(files)[kind]
    made = LmCollator(engine.tokenizer, MAX_WINDOWS)(Row(0, ((one,),)))
    ids, learned = made.input_ids[0], made.labels[0] != IGNORE
    runs = [list(run) for is_learned, run in groupby(range(len(ids)), lambda place: learned[place]) if is_learned]
    answers = [*(turn.answer for turn in one.history), one.answer]
    assert len(runs) == len(answers)
    for number, (run, answer) in enumerate(zip(runs, answers, strict=True)):
        if "placed" in kind:  # nobody can place a recording in a text over HTTP
            *history, last = messages_of(one)[: 2 * number + 1]
            request = Request(last.text, (Clip("a", 1), Clip("b", 1)), tuple(history))
        else:
            request = request_of(asked(one, number))
        assert ids[: run[0]].tolist() == prompt_ids(engine, request)
        assert engine.tokenizer.decode(ids[run]) == answer.lower().strip() + "<|endofchunk|><|endoftext|>"
        assert (made.labels[0][run] == ids[run]).all()
    assert runs[-1][-1] == len(ids) - 1
    assert len(made.windows_per_clip) == len(one.stretches)
    assert made.audio_index.tolist() == [list(range(len(one.stretches)))]
    is_system = template_of(engine.tokenizer) != CHAT_TEMPLATE
    assert engine.tokenizer.decode(ids).count("you hear sounds.") == is_system


def test_a_plan_counts_what_the_collator_makes(folder: Path, files: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kinds = list(samples_of(files).values())
    also = sample("also", files, ("Which is shorter?", "the first"), recordings=(0, 1))
    samples = [*kinds, also, sample("else", files, ("which?", "it"), recordings=(1, 0))]
    table = SampleTable.from_samples(samples)
    lengths, windows = text_lengths(tokenizer, samples), window_counts(samples, MAX_WINDOWS)
    for other in (table, Joined([table[:3], table[3:]]), Joined([samples[:3], samples[3:]])):
        np.testing.assert_array_equal(text_lengths(tokenizer, other), lengths)
        np.testing.assert_array_equal(window_counts(other, MAX_WINDOWS), windows)
        np.testing.assert_array_equal(clip_numbers(other), clip_numbers(samples))
        np.testing.assert_array_equal(durations(other), durations(samples))
    assert windows.tolist() == [1, 1, 3, 3, 3, 3, 3, 3]
    assert clip_numbers(samples).tolist() == [0, 0, 1, 1, 2, 1, 1, 3]
    assert durations(samples).tolist() == [4.0, 4.0, 18.0, 18.0, 29.0, 18.0, 18.0, 18.0]

    budget = Budget(windows_per_row=12, text_tokens_per_row=2048, questions_per_clip=4, step_batches=1)
    made = plan_epoch(samples, windows=windows, text_lengths=lengths, budget=budget, seed=0)
    collator = LmCollator(tokenizer, MAX_WINDOWS)
    batches = [collator(row) for row in made.rows()]
    assert sum(len(found.waveforms) for found in batches) == made.stats.num_windows == 1 + 3 + 3 + 3
    assert sum(int((found.attention_mask > 0).sum()) for found in batches) == made.stats.num_text_tokens
    assert sorted(found for one in batches for found in one.sample_ids) == sorted(one.id for one in samples)
    assert max(len(clip) for row in made.rows() for clip in row.clips) == 4


def test_a_row_of_one_and_of_two_recordings(engine: Engine, files: list[str]) -> None:
    kinds = samples_of(files)
    row = Row(0, ((kinds["one turn"], kinds["three turns"]), (kinds["two recordings"],)))
    made = LmCollator(engine.tokenizer, MAX_WINDOWS)(row)
    assert made.audio_index.tolist() == [[0, -1], [1, 2]]
    assert made.windows_per_clip.tolist() == [1, 1, 2]
    for place, (uri, seconds) in enumerate([(files[0], 4.0), (files[0], 4.0), (files[1], 14.0)]):
        start = int(made.windows_per_clip[:place].sum())
        heard = hear(Stretch(uri, 0.0, seconds), MAX_WINDOWS)
        np.testing.assert_array_equal(made.waveforms[start : start + len(heard)], heard)


def test_a_recording_that_fails_takes_its_group_with_it(engine: Engine, files: list[str]) -> None:
    kinds = samples_of(files)
    broken = dataclasses.replace(kinds["two recordings"], more_audio=(Stretch("none.flac", 3.0, 2.0),))
    made = LmCollator(engine.tokenizer, MAX_WINDOWS)(Row(7, ((broken, broken), (kinds["one turn"],))))
    (failure,) = made.failures
    assert (failure.uri, failure.reason, failure.offset_s, failure.num_samples) == ("none.flac", "missing", 3.0, 2)
    assert (made.num_clips, made.sample_ids, made.audio_index.tolist()) == (2, ("1",), [[0]])
    assert len(made.waveforms) == 1


def test_a_conversation_that_is_too_long_loses_its_end(engine: Engine, files: list[str]) -> None:
    row = Row(0, ((samples_of(files)["three turns"],),))
    whole = LmCollator(engine.tokenizer, MAX_WINDOWS)(row)
    cut = LmCollator(engine.tokenizer, MAX_WINDOWS, max_text_tokens=whole.labels.shape[1] - 4)(row)
    assert (whole.num_truncated, cut.num_truncated) == (0, 1)
    np.testing.assert_array_equal(cut.input_ids[0], whole.input_ids[0, :-4])
    np.testing.assert_array_equal(cut.labels[0], whole.labels[0, :-4])


def test_answers_are_the_processor_s_too(engine: Engine, folder: Path) -> None:
    """The processor of the folder writes the same, by its call and by `apply_chat_template`."""
    processor = AutoProcessor.from_pretrained(folder)
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    wanted = prompt_ids(engine, Request("What?", (Clip("a", 1),)))
    assert processor("What?", noise, sampling_rate=16_000)["input_ids"][0].tolist() == wanted
    parts = [{"type": "text", "text": "What?"}, {"type": "audio", "audio": noise}]
    turns = [{"role": "user", "content": parts}]
    found = processor(processor.apply_chat_template(turns), noise, sampling_rate=16_000)
    assert found["input_ids"][0].tolist() == wanted
    more = [*turns, {"role": "assistant", "content": "A dog"}, {"role": "user", "content": "Why?"}]
    history = (Message("user", "What?", 1), Message("assistant", "A dog"))
    wanted = prompt_ids(engine, Request("Why?", (Clip("a", 1),), history))
    found = processor(processor.apply_chat_template(more), noise, sampling_rate=16_000)
    assert found["input_ids"][0].tolist() == wanted
    learned = processor(["What?"], noise, sampling_rate=16_000, answers=["A dog"])["labels"]
    assert processor.tokenizer.decode(learned[learned != IGNORE]) == "a dog<|endofchunk|><|endoftext|>"


# --- Templates ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    yield tiny_tokenizer
    tiny_tokenizer.chat_template = None


def test_what_is_put_together_is_what_the_template_writes(tokenizer: Any, files: list[str]) -> None:
    """The short way and the template give one text, and of single turns the batch that prompts and answers give."""
    pairs = [(" What IS it?\n", " A Dog "), ("first <audio> then", "b"), ("", ""), ("ÀB\u00a0", "İ")]
    same_by_template = CHAT_TEMPLATE + "{# another #}"
    for prompt, answer in pairs:
        count = prompt.count("<audio>") or 2
        turn = [Message("user", prompt, count), Message("assistant", answer)]
        assert render(tokenizer, turn[:1]) == format_prompt(prompt, count)
        for part in (turn[:1], turn):
            assert render(tokenizer, part, same_by_template) == render(tokenizer, part)
    odd = [
        [Message("assistant", "Hello"), Message("user", " ", 1), Message("system", "x"), Message("system", " Y ")],
        [Message("system", " "), Message("user", "a", 2), Message("system", "b\n"), Message("user", " ", 1)],
    ]
    for messages in [*map(messages_of, samples_of(files).values()), *odd]:
        for stop in range(1, len(messages) + 1):
            assert render(tokenizer, messages[:stop], same_by_template) == render(tokenizer, messages[:stop])
    turns = [[Message("user", prompt, 1), Message("assistant", answer)] for prompt, answer in pairs]
    wanted = encode(tokenizer, [p for p, _ in pairs], [a for _, a in pairs], max_tokens=12)
    for template in (None, same_by_template):
        found = encode_conversations(tokenizer, turns, max_tokens=12, template=template)
        for name in ("input_ids", "attention_mask", "labels"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
        assert found.num_truncated == wanted.num_truncated > 0
    with pytest.raises(ValueError, match="1 <audio> markers for 2 audios"):
        render(tokenizer, [Message("user", "<audio> what?", 2)], same_by_template)


def test_a_system_message_stands_before_the_next_question(tokenizer: Any) -> None:
    said = [Message("system", "Be brief "), Message("user", "What?", 1)]
    assert render(tokenizer, said) == "<audio>be brief\nwhat?<SEP>"
    later = [*said, Message("assistant", "A dog"), Message("system", "now loud"), Message("user", "Why?")]
    assert render(tokenizer, later) == (
        "<audio>be brief\nwhat?<SEP>a dog<|endofchunk|><|endoftext|>now loud\nwhy?<SEP>"
    )
    assert render(tokenizer, [said[0], Message("user", "", 1)]) == "<audio>be brief<SEP>"


def test_only_a_template_of_this_model_counts(tokenizer: Any) -> None:
    for given in (None, "", CHATML, CHAT_TEMPLATE, CHAT_TEMPLATE + "\n", OLD_DEFAULT, {"default": OLD_DEFAULT}):
        tokenizer.chat_template = given
        assert template_of(tokenizer) == CHAT_TEMPLATE
    tokenizer.chat_template = {"default": SYSTEM, "tool_use": CHATML}
    assert template_of(tokenizer) == known_template(SYSTEM) == SYSTEM


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHAT_TEMPLATE + "{{ messages | length }}", "otherwise"),
        (CHAT_TEMPLATE.replace("{{ text }}<|endofchunk|>{{ eos_token }}", "{{ '' }}"), "leaves answers out"),
        (CHAT_TEMPLATE + "{{ raise_exception('no') }}", "fails on a conversation"),
        (CHAT_TEMPLATE + "{{ messages[0].nothing.there }}", "fails on a conversation"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_named(
    tokenizer: Any, files: list[str], template: str, message: str
) -> None:
    tokenizer.chat_template = template
    samples = list(samples_of(files).values())
    with pytest.raises(ValueError, match=f"chat template .*{message}"):
        text_lengths(tokenizer, samples)
    with pytest.raises(ValueError, match=f"chat template .*{message}"):
        LmCollator(tokenizer, MAX_WINDOWS)(Row(0, ((samples[1],),)))


def test_markers_are_as_many_as_recordings(files: list[str]) -> None:
    one = sample("x", files, ("<audio>what?", "a"), ("and?", "b"), recordings=(0, 1))
    with pytest.raises(ValueError, match="x: the prompts have 1 <audio> markers for 2 audios"):
        messages_of(one)


# --- Over HTTP ---------------------------------------------------------------------------------------------------


def test_what_one_role_says_in_a_row_is_one_message() -> None:
    part = serve_toy.audio_part(serve_toy.wav())
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": " and kind"},
        {"role": "user", "content": [part]},
        {"role": "user", "content": ["what?", part, "why?"]},
        {"role": "assistant", "content": "a bell"},
        {"role": "user", "content": "how often?"},
    ]
    request = request_of({"model": "af2", "messages": turns})
    assert request.history == (
        Message("system", "be brief\nand kind"),
        Message("user", "what?\nwhy?", 2),
        Message("assistant", "a bell"),
    )
    assert request.messages[-1] == Message("user", "how often?", 0)
    assert len(request.clips) == 2


# --- Asked again -------------------------------------------------------------------------------------------------


def test_questions_travel_with_their_history(files: list[str]) -> None:
    for number, one in enumerate(samples_of(files).values()):
        question = batch.Question.of(number, one)
        assert batch._question(json.loads(json.dumps(dataclasses.asdict(question)))) == question
        assert (question.prompt, question.history) == (messages_of(one)[-2].text, messages_of(one)[:-2])
        assert question.num_windows(MAX_WINDOWS) == window_counts([one], MAX_WINDOWS)[0]
    asked, _ = batch.questions_of(list(samples_of(files).values())[:3], "Which sound?")
    assert {(one.prompt, one.history) for one in asked} == {("Which sound?", ())}


def test_evaluation_asks_the_last_question_after_its_history(engine: Engine, folder: Path, files: list[str]) -> None:
    kinds = samples_of(files)
    samples = [kinds["three turns"], kinds["two recordings"], kinds["one turn"]]
    limits = Evaluation(max_windows=MAX_WINDOWS, batch_windows=4, max_new_tokens=6)
    predictions, failures = predict(folder, samples, limits, deaf_of={0: 1, 1: 2})
    assert failures == []
    heard = [[0], [0, 1], [0]], [[0], [0, 0], None]
    for texts, recordings in zip(
        ([one.text for one in predictions], [one.deaf_text for one in predictions]), heard, strict=True
    ):
        for one, text, numbers in zip(samples, texts, recordings, strict=True):
            if numbers is None:
                assert text is None
                continue
            clips = tuple(Clip.of(hear(Stretch(files[n], 0.0, SECONDS[n]), MAX_WINDOWS)) for n in numbers)
            *history, last = messages_of(one)[:-1]
            (answer,) = engine.answer([Request(last.text, clips, tuple(history), max_new_tokens=6)])
            assert isinstance(answer, Answer)
            assert text == answer.text.strip()


def test_a_second_recording_that_cannot_be_read_is_named(folder: Path, files: list[str]) -> None:
    one = dataclasses.replace(samples_of(files)["two recordings"], more_audio=(Stretch("none.flac", 0.0, 2.0),))
    predictions, failures = predict(folder, [one], Evaluation(max_windows=2, batch_windows=4, max_new_tokens=4))
    assert predictions == []
    assert [(failure.uri, failure.reason) for failure in failures] == [("none.flac", "missing")]


def test_a_template_of_its_own_is_another_version(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_windows": 3}')
    plain = batch.model_facts(str(tmp_path))
    for template, is_same in ((CHAT_TEMPLATE, True), (OLD_DEFAULT, True), (SYSTEM, False)):
        (tmp_path / "chat_template.jinja").write_text(template)
        assert (batch.model_facts(str(tmp_path)) == plain) is is_same


def test_the_engine_s_logits_are_those_of_training(engine: Engine, files: list[str]) -> None:
    """Each answer's first token, read by the engine and in a row of training that has the whole conversation."""
    tokenizer, model = engine.tokenizer, engine.model
    kinds = samples_of(files)
    chosen = [kinds["two recordings"], kinds["one more with a later question"], kinds["three turns"]]
    made = LmCollator(tokenizer, MAX_WINDOWS)(Row(0, tuple((one,) for one in chosen))).tensors()
    with torch.inference_mode():
        logits = model(
            made.input_ids,
            made.attention_mask,
            made.waveforms,
            made.windows_per_clip,
            made.audio_index,
            texts_per_row=1,
        ).logits
    for row, one in enumerate(chosen):
        clips = [Clip.of(hear(stretch, MAX_WINDOWS)) for stretch in one.stretches]
        learned = (made.labels[row] != IGNORE).int().tolist()
        starts = [place for place in range(1, len(learned)) if learned[place] > learned[place - 1]]
        for number, start in enumerate(starts):
            *history, last = messages_of(one)[: 2 * number + 1]
            num = last.num_audios + sum(message.num_audios for message in history)
            request = Request(
                last.text, tuple(clips[:num]), tuple(history), max_new_tokens=1, min_new_tokens=1, top_logprobs=1
            )
            (answer,) = engine.answer([request])
            assert isinstance(answer, Answer)
            logprobs = torch.log_softmax(logits[row, start - 1].float(), dim=-1)
            logprobs[tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<|endoftext|>"])] = -torch.inf
            assert answer.logprobs[0].logprob == pytest.approx(float(logprobs.max()), abs=1e-3)
