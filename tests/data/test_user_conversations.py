"""Conversations as users have them: each format as its tool writes it, and one broken file of each."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from user_files import Write, chat, refused, turns, write_to

from af2_ray.audio.hear import Stretch
from af2_ray.data.durations import fill_durations
from af2_ray.data.manifest import read_samples
from af2_ray.data.samples import Sample, Turn, check_samples


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return write_to(tmp_path)


def test_the_rows_of_the_readme_are_read(write: Write, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    table = readme[readme.index("### Formats") : readme.index("### A recipe")]
    rows = [json.loads(text) for text in re.findall(r"\| `(\{.*\})` \|", table)]
    assert len(rows) == 5
    for samples in (read_samples(write("rows.jsonl", rows)), read_samples(write("rows.json", rows))):
        assert {(s.uri, s.prompt, s.answer.removesuffix(".").lower()) for s in samples} == {
            (f"{tmp_path}/a.wav", "What is heard?", "a dog")
        }


# --- AF3 ---------------------------------------------------------------------------------------------------------


def test_af3(write: Write, tmp_path: Path) -> None:
    rows = [
        {"id": "ID1", "sound": "a.wav", "duration": 12.5, "conversations": turns("<sound>\nWhat is heard?", "A dog.")},
        {
            "id": "ID2",
            "sound": ["a.wav", "sub/b.flac"],
            "duration": [1.0, 2.0],
            "conversations": turns("<sound-1>\n<sound-2>\nIs <sound-2> louder?", "Yes.", "By much?", "No."),
        },
        {"id": "ID3", "sound": ["a.wav", "b.wav"], "duration": 3.0, "conversations": turns("Which is longer?", "b")},
        {
            "id": "ID4",
            "sound": ["a.wav", "b.wav"],
            "conversations": turns("<sound-2>One?", "x", "<sound-1>\nTwo?", "y"),
        },
    ]
    one, two, three, four = read_samples(write("af3.json", rows))
    folder, dataset = str(tmp_path), f"{tmp_path.name}/af3"
    assert one == Sample("ID1", f"{folder}/a.wav", 0.0, 12.5, "What is heard?", "A dog.", dataset, dataset)
    assert two.stretches == (Stretch(f"{folder}/a.wav", 0.0, 1.0), Stretch(f"{folder}/sub/b.flac", 0.0, 2.0))
    assert two.history == (Turn("Is sound 2 louder?", "Yes."),)  # where all is heard at first there are no markers
    assert (two.prompt, two.answer) == ("By much?", "No.")
    assert [stretch.uri[-5:] for stretch in three.stretches] == ["a.wav", "b.wav"]
    assert all(stretch.duration_s != stretch.duration_s for stretch in three.stretches)  # whose the 3 s are is not said
    assert (three.history, three.prompt) == ((), "Which is longer?")
    assert [stretch.uri[-5:] for stretch in four.stretches] == ["b.wav", "a.wav"]  # in the order of their tags
    assert (four.history, four.prompt) == ((Turn("<audio>One?", "x"),), "<audio>Two?")
    assert check_samples([one, two])[1] == []


def test_tags_that_do_not_fit_the_recordings_are_set_aside(write: Write) -> None:
    asked = {
        "<sound><sound>\nWhich?": ["a.wav"],
        "<sound-1>\nWhich?": ["a.wav", "b.wav"],
    }
    rows = [
        {"sound": sounds, "duration": [1.0] * len(sounds), "conversations": turns(text, "x")}
        for text, sounds in asked.items()
    ]
    rows.append({"sound": "a.wav", "duration": 1.0, "conversations": turns("Which?", "an <audio>")})
    rows.append({"duration": 1.0, "conversations": turns("Which?", "x")})
    samples = read_samples(write("af3.json", rows))
    reasons = ["audio markers"] * 3 + ["empty name"]
    for checked in (samples, list(samples)):
        assert [reason for _, reason in check_samples(checked)[1]] == reasons


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"sound": 3, "conversations": turns("q", "a")}, r"key 'sound' must be a path or a list of paths, got 3"),
        ({"sound": "a", "conversations": "q"}, "key 'conversations' must be a list of turns"),
        ({"sound": "a", "conversations": []}, "key 'conversations' must be a list of turns"),
        ({"sound": "a", "conversations": turns("q", "a")[::-1]}, r"turn 1: expected a question \(human or user\)"),
        ({"sound": "a", "conversations": [*turns("q"), *turns("r")]}, r"turn 2: expected an answer"),
        ({"sound": "a", "conversations": [{"from": "tool", "value": "q"}]}, "turn 1: key 'from' must be human or gpt"),
        ({"sound": "a", "conversations": [{"from": "human"}]}, "turn 1: key 'value' is missing"),
        ({"sound": "a", "conversations": [{"from": "system", "value": "s"}]}, "turn 1: .*chat template of the model"),
        ({"sound": "a", "duration": "x", "conversations": turns("q", "a")}, "'duration' must be a number of seconds"),
        ({"sound": ["a", "b"], "duration": [1], "conversations": turns("q", "a")}, "a number for each of 2 recordings"),
        (
            {"sound": ["a", "b"], "audio_start": 2, "conversations": turns("q", "a")},
            "'audio_start' must be a list of 2",
        ),
        (
            {"sound": "a", "conversations": turns("<sound-2>q", "a")},
            "the tag <sound-2> names no recording: there are 1",
        ),
        ({"sound": "a", "conversations": turns("<sound-0>q", "a")}, "the tag <sound-0> names no recording"),
        ("a.wav", "expected an object"),
        ({"sound": "a.wav"}, "key 'name' is missing"),
    ],
)
def test_broken_af3(write: Write, row: Any, words: str) -> None:
    good = {"sound": "a.wav", "conversations": turns("q", "a")}
    with pytest.raises(ValueError, match=rf"af3\.json, row 2: .*{words}"):
        read_samples(write("af3.json", [good, row]))


def test_a_list_may_hold_plain_samples(write: Write, tmp_path: Path) -> None:
    rows = [{"audio": "a.wav", "question": "q?", "answer": "x"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows * 2)
    for uri, count in ((write("list.json", rows), 1), (write("lines.json", lines), 2)):
        samples = read_samples(uri)
        assert [(s.uri, s.prompt, s.answer) for s in samples] == [(f"{tmp_path}/a.wav", "q?", "x")] * count
    assert "line 3: not JSON" in refused(write("lines.json", lines + "{oops"))
    assert "is an object with a `data` object" in refused(write("empty.json", []))
    assert "not JSON: Extra data" in refused(write("two.json", '{"data": {}} {}'))


# --- OpenAI ------------------------------------------------------------------------------------------------------


def test_openai_messages(write: Write, make_sound: Callable[..., str], tmp_path: Path) -> None:
    sound = Path(make_sound("inline.wav", 1.5)).read_bytes()
    inline = {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound).decode(), "format": "wav"}}
    named = {"type": "audio_url", "audio_url": {"url": "clips/b.wav"}}
    make_sound("clips/b.wav", 2.0)
    text = [{"type": "text", "text": "Which is louder?"}, {"type": "text", "text": "Say first or second."}]
    answer = {"role": "assistant", "content": "first"}
    rows = [
        {"messages": [{"role": "user", "content": [inline, named, *text]}, answer]},
        {
            "messages": [
                {"role": "user", "content": [inline, text[0]]},
                answer,
                {"role": "user", "content": [named, "And?"]},
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "s3://b/c.wav"}}]}]},
    ]
    uri = write("chat.jsonl", rows)
    for _ in range(2):
        one, two, three = read_samples(uri)
        assert one.prompt == "Which is louder?\nSay first or second."  # as the server joins parts
        assert Path(one.uri).read_bytes() == sound
        assert Path(one.uri).parent == tmp_path / "chat.jsonl.clips"
        assert one.more_audio[0].uri == f"{tmp_path}/clips/b.wav"
        assert len(list(Path(one.uri).parent.iterdir())) == 1  # of two uses
        assert two.history == (Turn("<audio>Which is louder?", "first"),)
        assert (two.prompt, two.answer) == ("<audio>And?", "")  # to be answered
        assert (three.uri, three.prompt) == ("s3://b/c.wav", "<audio>")
    filled, unread = fill_durations(read_samples(uri)[:1], uri)
    assert unread == {}
    assert [stretch.duration_s for stretch in filled[0].stretches] == [1.5, 2.0]
    assert [reason for _, reason in check_samples(filled)[1]] == []


def test_inline_recordings_of_a_store_lie_in_that_store(make_sound: Callable[..., str]) -> None:
    sound = Path(make_sound("inline.wav", 1.0)).read_bytes()
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound).decode(), "format": "wav"}}
    row = {"messages": [{"role": "user", "content": [part, "What?"]}, {"role": "assistant", "content": "x"}]}
    store = fsspec.filesystem("memory")
    store.pipe_file("/inline/chat.jsonl", json.dumps(row).encode())
    (sample,) = read_samples("memory://inline/chat.jsonl")
    assert sample.uri.startswith("memory://inline/chat.jsonl.clips/")
    assert store.cat_file(sample.uri.removeprefix("memory:/")) == sound


def test_names_in_messages_are_checked_as_all_names(write: Write) -> None:
    urls = ["data:audio/wav;base64,UklGRg==", "http://a.b/c.wav", "../../x.wav", "zip://a.wav::s3://b/c.zip"]
    parts = [{"type": "audio_url", "audio_url": {"url": url}} for url in urls]
    good = {"type": "audio_url", "audio_url": {"url": "a.wav"}}
    rows = [
        {
            "messages": [{"role": "user", "content": [*first, part, "q"]}, *chat("q", "a")[1:]],
            "duration": [1.0] * (1 + len(first)),
        }
        for part in parts
        for first in ([], [good])
    ]
    samples = read_samples(write("chat.jsonl", rows))
    reasons = ["scheme not allowed", "scheme not allowed", "name leads outside", "chained name"]
    for checked in (samples, list(samples)):
        assert [reason for _, reason in check_samples(checked)[1]] == [r for r in reasons for _ in range(2)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "image_url", "image_url": {"url": "a.png"}}], "turn 1: a part must be"),
        ([{"type": "text"}], "turn 1: a part must be"),
        ([7], "turn 1: a part must be"),
        (None, "turn 1: key 'content' must be a string or a list of parts, got None"),
        (
            [{"type": "input_audio", "input_audio": {"data": "%%%", "format": "wav"}}],
            "turn 1: key 'data' must be .* base64",
        ),
        ([{"type": "input_audio", "input_audio": {"data": "", "format": "../x"}}], "turn 1: key 'format' must be"),
    ],
)
def test_broken_openai_messages(write: Write, content: Any, words: str) -> None:
    good = {"messages": chat("q", "a"), "audios": ["a.wav"]}
    bad = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]}
    with pytest.raises(ValueError, match=rf"chat\.jsonl, line 2: key 'messages', {words}"):
        read_samples(write("chat.jsonl", [good, bad]))


def test_a_place_that_cannot_be_written_is_named(write: Write, tmp_path: Path) -> None:
    part = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    uri = write("chat.jsonl", [{"messages": [{"role": "user", "content": [part]}]}])
    (tmp_path / "chat.jsonl.clips").write_text("a file where the folder would be")
    assert "cannot be written" in refused(uri)


# --- ms-swift and LLaMA-Factory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["swift.jsonl", "swift.json", "swift.parquet"])
def test_messages_with_audios(write: Write, tmp_path: Path, name: str) -> None:
    rows = [
        {"messages": chat("<audio>What is said?", "Hello."), "audios": ["a.wav"]},
        {
            "messages": chat("<audio>\n<audio>\nWhich?", "b", "<audio>And this?", "c"),
            "audios": ["a.wav", "b.wav", "/c.wav"],
        },
    ]
    one, two = read_samples(write(name, rows))
    assert (one.uri, one.prompt, one.answer) == (f"{tmp_path}/a.wav", "What is said?", "Hello.")
    assert two.history == (Turn("<audio><audio>Which?", "b"),)
    assert (two.prompt, two.answer, two.more_audio[-1].uri) == ("<audio>And this?", "c", "/c.wav")
    system = [{"role": "system", "content": "You hear."}, *chat("<audio>q", "a")]
    uri = write(name, [rows[0], {"messages": system, "audios": ["a.wav"]}])
    said = refused(uri)
    assert f"{name}, {'line' if name.endswith('l') else 'row'} 2: key 'messages', turn 1" in said
    assert "chat template of the model's folder" in said


def test_sharegpt(write: Write, tmp_path: Path) -> None:
    rows = [{"conversations": turns("<audio>What is heard?", "A bell."), "audios": ["a.wav"]}]
    (sample,) = read_samples(write("sharegpt.json", rows))
    assert (sample.uri, sample.prompt, sample.answer) == (f"{tmp_path}/a.wav", "What is heard?", "A bell.")
    said = refused(write("sharegpt.json", [*rows, rows[0] | {"system": "You hear."}]))
    assert "sharegpt.json, row 2: key 'system'" in said
    assert "chat template" in said
    assert "row 1: key 'audios' must be a path or a list" in refused(
        write("x.json", [rows[0] | {"audios": [{"a": 1}]}])
    )
