"""Samples of several turns and recordings: durations, what is set aside, and the same from columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from af2_ray.audio.hear import Stretch
from af2_ray.data import durations as durations_module
from af2_ray.data.columns import SampleTable, without_duration
from af2_ray.data.durations import fill_durations
from af2_ray.data.samples import Sample, Turn, check_samples

PLAIN = Sample("p", "a.flac", 0.0, 1.0, "which?", "bell", "AQA", "d")
TALK = replace(PLAIN, id="t", history=(Turn("first?", "dog"),), more_audio=(Stretch("b.flac", 0.0, 2.0),))


def changed(**change: object) -> Sample:
    return replace(TALK, **change)  # type: ignore[arg-type]


def test_each_turn_and_recording_is_checked_in_lists_and_in_columns() -> None:
    good = [
        PLAIN,
        TALK,
        changed(history=(Turn("<audio>first?", "dog"),), prompt="<AUDIO> which?"),
        changed(history=(Turn("<audio> and <audio> first?", "dog"),)),
        changed(history=(), prompt="1: <audio> 2: <audio>"),
        changed(history=(Turn("one", "x"), Turn("two", "y")), more_audio=()),
        replace(PLAIN, prompt="Is it NaN?", history=(Turn("NaN", "NaN"),)),
    ]
    bad = [
        (changed(history=(Turn("<audio>first?", "dog"),)), "audio markers"),
        (changed(prompt="<audio>which?"), "audio markers"),
        (changed(prompt="<audio><audio><audio>"), "audio markers"),
        (changed(history=(Turn("first?", "<audio>"),)), "audio markers"),
        (replace(PLAIN, answer="an <Audio>"), "audio markers"),
        (replace(PLAIN, prompt="<audio> <audio>"), "audio markers"),
        (changed(history=(Turn(" ", "dog"),)), "empty prompt"),
        (changed(history=(Turn("first?", ""),)), "empty answer"),
        (changed(more_audio=(Stretch("b.flac", 0.0, math.nan),)), "no duration"),
        (changed(more_audio=(Stretch("b.flac", 0.0, 2.0), Stretch("b.flac", 0.0, 0.0))), "zero duration"),
        (changed(more_audio=(Stretch("b.flac", -1.0, 2.0),)), "negative offset"),
        (changed(more_audio=(Stretch("http://a.b/c.wav", 0.0, 2.0),)), "scheme not allowed"),
        (changed(more_audio=(Stretch("", 0.0, 2.0),)), "empty name"),
    ]
    samples = [*good, *(sample for sample, _ in bad)]
    for given in (samples, SampleTable.from_samples(samples)):
        usable, others = check_samples(given)
        assert list(usable) == good
        assert [reason for _, reason in others] == [reason for _, reason in bad]
    unread = {"b.flac": "unreadable"}
    for given in (samples, SampleTable.from_samples(samples)):
        assert "unreadable" in [reason for _, reason in check_samples(given, unread)[1]]


def test_hostile_names_of_further_recordings(hostile: list[tuple[str, str]], tmp_path: Path) -> None:
    refused = {"missing", "unreadable", "empty file", "not a regular file"}
    by_text = [(name, reason) for name, reason in hostile if reason not in refused]
    samples = [changed(more_audio=(Stretch(name, 0.0, 1.0),)) for name, _ in by_text]
    for given in (samples, SampleTable.from_samples(samples)):
        assert [reason for _, reason in check_samples(given)[1]] == [reason for _, reason in by_text]
    unmeasured = [changed(more_audio=(Stretch(name, 0.0, math.nan),)) for name, _ in hostile]
    for given in (unmeasured, SampleTable.from_samples(unmeasured)):
        filled, unread = fill_durations(given, str(tmp_path / "m.jsonl"))
        good, bad = check_samples(filled, unread)
        assert list(good) == []
        assert [reason for _, reason in bad] == [reason for _, reason in hostile]


def test_durations_of_further_recordings(
    make_sound: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make_sound("one.flac", 1.5), make_sound("two.flac", 2.5)
    samples = [
        replace(PLAIN, uri=one),
        replace(TALK, uri=one, more_audio=(Stretch(two, 0.5, math.nan), Stretch("none.flac", 0.0, 1.0))),
        replace(TALK, uri=one, duration_s=math.nan, more_audio=(Stretch(two, 0.0, math.nan),)),
        replace(TALK, uri=one, history=(Turn("NaN", "x"),), more_audio=(Stretch(two, 0.0, 1.0),)),
        replace(TALK, uri=one, more_audio=(Stretch("none.flac", 0.0, math.nan),)),
    ]
    wanted = [
        samples[0],
        replace(samples[1], more_audio=(Stretch(two, 0.5, 2.0), Stretch("none.flac", 0.0, 1.0))),
        replace(samples[2], duration_s=1.5, more_audio=(Stretch(two, 0.0, 2.5),)),
        samples[3],
    ]
    manifest = str(tmp_path / "train.jsonl")
    for given in (samples, SampleTable.from_samples(samples)):
        assert without_duration(given).tolist() == [1, 2, 4]
        filled, unread = fill_durations(given, manifest)
        assert list(filled)[:4] == wanted
        assert unread == {"none.flac": "missing"}
        good, bad = check_samples(filled, unread)
        assert list(good) == wanted
        assert [reason for _, reason in bad] == ["missing"]
    asked: list[str] = []
    monkeypatch.setattr(durations_module, "probe", lambda uri: asked.append(uri) or 1.0)
    fill_durations(samples, manifest)
    assert asked == ["none.flac"]  # the others are kept beside the manifest
