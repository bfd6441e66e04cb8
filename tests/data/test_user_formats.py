"""Data as users have it: each format as its tool writes it, and one broken file of each."""

from __future__ import annotations

import base64
import csv
import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from af2_ray.audio.hear import Stretch
from af2_ray.config import parse_columns
from af2_ray.data.durations import fill_durations
from af2_ray.data.manifest import read_captions, read_samples
from af2_ray.data.samples import Sample, Turn, check_samples, list_options

Write = Callable[[str, Any], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Function that writes rows (or a text) to a file of a name and returns its path."""

    def to(name: str, rows: Any) -> str:
        path = tmp_path / name
        if isinstance(rows, str):
            path.write_text(rows, encoding="utf-8")
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif name.endswith(".json"):
            path.write_text(json.dumps(rows, indent=2))
        elif name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, list(rows[0]), dialect="excel-tab" if name.endswith(".tsv") else "excel")
                table.writeheader()
                table.writerows(rows)
        return str(path)

    return to


def refused(uri: str, **more: Any) -> str:
    with pytest.raises(ValueError) as caught:
        read_samples(uri, **more)
    return str(caught.value)


def turns(*texts: str, names: tuple[str, str] = ("from", "value")) -> list[dict[str, str]]:
    roles = ("human", "gpt") if names[0] == "from" else ("user", "assistant")
    return [{names[0]: roles[place % 2], names[1]: text} for place, text in enumerate(texts)]


def chat(*texts: str) -> list[dict[str, str]]:
    return turns(*texts, names=("role", "content"))


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


# --- Tables ------------------------------------------------------------------------------------------------------

TABLE = [{"path": "a.wav", "q": 'Which, "if any"?', "a": "01"}, {"path": "b.wav", "q": "Two\nlines?", "a": "dog"}]
COLUMNS = "audio=path, question=q,answer=a"


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet", "t.jsonl", "t.json"])
def test_named_columns(write: Write, tmp_path: Path, name: str) -> None:
    uri = write(name, TABLE)
    samples = read_samples(uri, columns=parse_columns(COLUMNS))
    wanted = [(f"{tmp_path}/{row['path']}", row["q"], row["a"]) for row in TABLE]
    assert [(s.uri, s.prompt, s.answer) for s in samples] == wanted
    assert read_samples(uri, "s3://b", parse_columns(COLUMNS))[1].uri == "s3://b/b.wav"
    said = refused(uri, columns=parse_columns("audio=path,question=q,answer=none"))
    assert name in said
    assert "'none', which `columns` gives for 'output'" in said or "'none' is missing, which `columns` gives" in said
    said = refused(uri)
    assert name in said
    assert "'prompt'" in said
    assert "question" in said


def test_a_column_that_has_another_use_is_not_taken_for_a_known_one(write: Write) -> None:
    rows = [{"name": "speaker 1", "wav": "a.wav", "text": "Who?", "label": "x", "answer": "no"}]
    for name in ("t.csv", "t.parquet"):
        (sample,) = read_samples(write(name, rows), columns={"audio": "wav", "question": "text", "answer": "label"})
        assert (Path(sample.uri).name, sample.prompt, sample.answer) == ("a.wav", "Who?", "x")


def test_csv_cells(write: Write, tmp_path: Path) -> None:
    head = "audio,question,answer,duration,options,skill\n"
    rows = 'a.wav,Which?,dog,,dog|cat,animals\nb.wav,Which?,cat,2.5,"[""dog"", ""cat""]",\n'
    uri = write("t.csv", "\ufeff" + head + rows)  # as Excel writes it
    one, two = read_samples(uri)
    assert (one.options, one.skill, one.duration_s != one.duration_s) == (("dog", "cat"), "animals", True)
    assert (two.options, two.skill, two.duration_s) == (("dog", "cat"), "", 2.5)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress((head + rows).encode()))
    assert [s.prompt for s in read_samples(str(tmp_path / "t.csv.gz"))] == ["Which?", "Which?"]
    assert "t.csv, line 3: not as many values as columns" in refused(
        write("t.csv", head + rows.splitlines()[0] + "\nc.wav\n")
    )
    assert "t.csv, line 2: key 'duration' must be a number" in refused(write("t.csv", head + "a.wav,q,a,long,,\n"))
    assert "t.csv, line 2: key 'options' must be a list" in refused(write("t.csv", head + 'a.wav,q,a,1,"[""x",\n'))
    assert "t.csv, line 1: the column 'a' comes twice" in refused(write("t.csv", "a,a\n1,2\n"))
    (tmp_path / "latin.csv").write_bytes(b"audio,question,answer\na.wav,caf\xe9?,x\n")
    assert "latin.csv: not UTF-8 text" in refused(str(tmp_path / "latin.csv"))
    assert "none.csv: no such file" in refused(str(tmp_path / "none.csv"))


def test_broken_parquet(write: Write) -> None:
    row = {"audio": "a.wav", "question": "q", "answer": "a"}
    assert "t.parquet, row 2: column 'duration': key 'duration' must be a number of seconds, got 'long'" in refused(
        write("t.parquet", [row | {"duration": "1.5"}, row | {"duration": "long"}])
    )
    assert "column 'answer' (key 'output') must hold strings, it holds list" in refused(
        write("t.parquet", [row | {"answer": ["a"]}])
    )
    assert "t.parquet, row 1: key 'options' must be a list" in refused(write("t.parquet", [row | {"options": 3}]))
    (sample,) = read_samples(write("t.parquet", [row | {"duration": "", "options": ["x", "y"], "answer": 7}]))
    assert (sample.answer, sample.options, sample.duration_s != sample.duration_s) == ("7", ("x", "y"), True)
    bad = {"messages": chat("q")[:1] * 2, "audios": ["a.wav"]}
    assert "t.parquet, row 1: key 'messages', turn 2: expected an answer" in refused(write("t.parquet", [bad]))


def test_what_is_given_as_columns_is_checked(write: Write) -> None:
    assert parse_columns("") == {}
    for text, words in (("audio", "not key=column"), ("=x", "not key=column"), ("a=b,a=c", "'a' comes twice")):
        with pytest.raises(ValueError, match=words):
            parse_columns(text)
    uri = write("t.csv", TABLE)
    assert "'sound_file' is no key of a sample: give some of audio, question" in refused(
        uri, columns={"sound_file": "path"}
    )
    assert "another name of a key" in refused(uri, columns={"question": "q", "prompt": "a"})
    nvidia = write("n.json", {"data": {"0": {"name": "a", "prompt": "q", "output": "x"}}})
    assert "NVIDIA's JSON has keys of its own" in refused(nvidia, columns={"audio": "path"})


def test_captions_have_columns_too(write: Write) -> None:
    rows = [{"file": "a.wav", "words": "a dog", "other": "no", "positives": "a hound|one dog"}]
    columns = {"audio": "file", "caption": "words"}
    for name in ("c.csv", "c.parquet", "c.jsonl"):
        (one,) = read_captions(write(name, rows), columns=columns)
        assert (Path(one.uri).name, one.caption, one.positives) == ("a.wav", "a dog", ("a hound", "one dog"))
    with pytest.raises(ValueError, match="caption sets are read from JSON lines"):
        read_captions(write("c.json", rows))


# --- Folders of labels -------------------------------------------------------------------------------------------

LABELS = ("dog", "cat", "church_bell", "rain", "wind")


@pytest.fixture
def sounds(make_sound: Callable[..., str], tmp_path: Path) -> Path:
    for label in LABELS:
        for number in range(8):
            make_sound(f"sounds/{label}/{number}.wav", 0.1)
    return tmp_path / "sounds"


def test_a_folder_of_labels(sounds: Path, tmp_path: Path) -> None:
    samples = read_samples(str(sounds))
    names = {label: label.replace("_", " ") for label in LABELS}
    assert len(samples) == 40
    for sample in samples:
        label = Path(sample.uri).parent.name
        assert sample.answer == names[label]
        assert sample.prompt == "Which sound is heard?" + list_options(sample.options)
        assert len({*sample.options}) == 4
        assert {sample.answer} < {*sample.options} < {*names.values()}
        assert (sample.skill, sample.task, sample.dataset) == ("identification", "AQA", f"{tmp_path.name}/sounds")
    places = Counter((s.answer, s.options.index(s.answer)) for s in samples)
    assert {*places.values()} == {2}  # each label is right at each place as often as at another
    filled, unread = fill_durations(samples, str(sounds))
    assert (unread, check_samples(filled)[1]) == ({}, [])
    options = {sample.uri: {*sample.options} for sample in samples}
    (sounds / "dog" / "8.wav").write_bytes((sounds / "dog" / "0.wav").read_bytes())
    again = {sample.uri: {*sample.options} for sample in read_samples(f"{sounds}/")}
    assert {uri: again[uri] for uri in options} == options  # another clip does not change what is asked of these
    moved = read_samples(str(sounds), "s3://bucket/sounds")
    assert moved[0].uri == "s3://bucket/sounds/cat/0.wav"
    assert moved[0].prompt == samples[0].prompt
    store = fsspec.filesystem("memory")
    for path in sounds.rglob("*.wav"):
        store.pipe_file(f"/labels/sounds/{path.relative_to(sounds)}", b"x")
    stored = read_samples("memory://labels/sounds")
    assert [sample.prompt for sample in stored] == [sample.prompt for sample in read_samples(str(sounds))]
    assert stored[0].uri == "memory://labels/sounds/cat/0.wav"


def test_what_is_no_clip_of_a_label_is_remarked(sounds: Path, make_sound: Callable[..., str]) -> None:
    make_sound("sounds/dog/more/9.wav", 0.1)
    make_sound("sounds/loose.wav", 0.1)
    (sounds / "dog" / "notes.txt").write_text("a dog")
    (sounds / "dog" / ".hidden.wav").write_bytes(b"")
    samples = read_samples(str(sounds))
    assert len(samples) == 40
    assert samples.remarks == ("3 files are no label/clip.*, for instance dog/more/9.wav",)


def test_broken_folders_of_labels(sounds: Path, tmp_path: Path, make_sound: Callable[..., str]) -> None:
    make_sound("one/dog/0.wav", 0.1)
    assert "expected two or more folders of clips" in refused(str(tmp_path / "one"))
    make_sound("flat/0.wav", 0.1)
    assert "no such manifest, or of no known format" in refused(str(tmp_path / "flat"))
    assert "a folder of labels has none" in refused(str(sounds), columns={"audio": "path"})
    (sounds / "train.json").write_text("{}")
    assert "a folder with manifests: name one of them" in refused(str(sounds))
