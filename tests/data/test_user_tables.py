"""Tables and folders of labels as users have them, and broken ones."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from user_files import Write, chat, refused, write_to

from af2_ray.config import parse_columns
from af2_ray.data.durations import fill_durations
from af2_ray.data.manifest import read_captions, read_samples
from af2_ray.data.samples import check_samples, list_options


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return write_to(tmp_path)


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
