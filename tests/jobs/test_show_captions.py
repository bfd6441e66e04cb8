"""The page for judges: every caption on its side, the recordings in it, and what could not be read."""

from __future__ import annotations

import base64
import io
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import soundfile as sf
import toy
from job_runner import run_job

run = partial(run_job, "show_captions")


def test_a_page_of_caption_sets(tmp_path: Path, capsys: Any) -> None:
    corpus = toy.make(tmp_path, num_clips=6)
    captions = corpus / "train.captions.jsonl"
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    rows[0] |= {"name": "train/<gone>.flac"}
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(captions, "--num", 6, "--out", tmp_path / "page.html") == 0
    assert "5 clips in" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert page.count("<article>") == 5
    assert page.count('data-said="true"') == 5 * 3
    assert page.count('data-said="wrong"') == 5 * 9
    assert "&lt;gone&gt;.flac" in page
    assert "<gone>" not in page
    audio = re.search(r"base64,([^\"]+)", page)
    assert audio
    info = sf.info(io.BytesIO(base64.b64decode(audio[1])))
    assert (info.format, info.samplerate) == ("OGG", 16_000)


def test_captions_that_cannot_be_read_are_told(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "bad.jsonl").write_text('{"name": "a.flac"\n')
    assert run(tmp_path / "bad.jsonl", "--out", tmp_path / "page.html") == 2
    assert "bad.jsonl, line 1" in capsys.readouterr().err
