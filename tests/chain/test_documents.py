"""Every command of README and docs, as typed, in a checkout where the demo has run.

A comment before each block says what is done with it:

    run                   as it stands
    short                 with what makes each job short (`short_of`)
    background: URL       started, and waited for until the URL answers; ends when the next one starts
    cluster               short, on a Ray cluster that it starts; ended by its process id, not by `ray stop`, which
                          would end every other cluster of the machine
    not run: WHY
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import toy

from af2_ray.config import load_recipe, load_sweep

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
CODE = ("af2_ray", "jobs", "serve_apps", "benchmarks", "tests", "cluster")
WITH_RECIPE = {"train", "train_clap", "make_data", "plan", "probe"}  # jobs that take RECIPE and key=value
MARKER = re.compile(r"^ *<!-- (run|short|background: \S+|cluster|not run: .+) -->$")


@dataclass(frozen=True)
class Block:
    """A block of code: where it is, its language, and what its comment says."""

    place: str
    language: str
    marker: str
    text: str


def blocks(document: str) -> Iterator[Block]:
    lines = (ROOT / document).read_text().splitlines()
    opened = [number for number, line in enumerate(lines) if re.match(r" *```\w+$", line)]
    for number in opened:
        found = MARKER.match(lines[number - 1])
        pad = len(lines[number]) - len(lines[number].lstrip())
        end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == "```")
        text = "\n".join(line[pad:] for line in lines[number + 1 : end])
        yield Block(f"{document}:{number + 2}", lines[number].strip(" `"), found[1] if found else "", text)


def commands(text: str) -> list[list[str]]:
    """Words of each `python jobs/...` of a block."""
    joined = text.replace("\\\n", " ")
    found = re.findall(r"python (jobs/\w+\.py[^\n]*)", joined)
    return [shlex.split(line, comments=True) for line in found]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_block_says_whether_it_is_run(document: str) -> None:
    for block in blocks(document):
        assert block.marker, f"{block.place}: put <!-- run -->, or what else is done, before the block"
    indented = re.findall(r"\n\n {4}(?:python|ray|make|serve|mlflow|curl) .*", (ROOT / document).read_text())
    assert not indented, "commands stand between fences, where this test finds them"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_name_what_there_is(document: str) -> None:
    for block in blocks(document):
        for job, *words in commands(block.text):
            assert (ROOT / job).is_file(), f"{block.place}: {job}"
            name = Path(job).stem
            if name in WITH_RECIPE and not words[0].endswith(".yaml"):
                load_recipe(words[0], [word for word in words[1:] if re.match(r"[\w.]+=", word)])
            elif name == "sweep" and not words[0].endswith(".yaml"):
                load_sweep(words[0])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_are_there(document: str) -> None:
    text = (ROOT / document).read_text()
    named = re.findall(rf"`((?:{'|'.join(CODE)}|docs)/[\w./-]*\w)(?=[`#:])", text)
    linked = [str(Path(document).parent / name) for name in re.findall(r"\]\((?!http)([\w./-]+)", text)]
    missing = [name for name in named + linked if not (ROOT / name).exists()]
    assert not missing, f"{document} names what is not there: {missing}"


def test_references_to_the_paper_lead_to_a_heading() -> None:
    headings = set(re.findall(r"^## (.+)$", (ROOT / "docs" / "paper.md").read_text(), re.MULTILINE))
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    for path in files:
        for heading in re.findall(r'docs/paper\.md,\s+"([^"]+)"', path.read_text()):
            assert heading in headings, f"{path}: docs/paper.md has no heading {heading!r}, only {sorted(headings)}"


def short_of(name: str, first: str, data: Path) -> list[str]:
    """What makes a job short: few steps, small models, the toy corpus in `data`."""
    small = [word for word in toy.overrides(data, "runs") if not word.startswith("storage=")]  # commands give theirs
    if name == "train":
        return small
    if name == "train_clap":
        return [word for word in small if not word.startswith("clap.text.")]
    if name == "make_data":
        scenes = "{name: short, split: train, num_scenes: 8, duration_s: [5, 8], num_events: [1, 2]}"
        return ["corpus.num_classes=6", f"corpus.sets=[{scenes}]"]
    if name == "finetune":
        return ["stages.finetune.steps=6"]
    return ["--list"] if name == "sweep" and not first.endswith(".yaml") else []


def shortened(text: str, data: Path) -> str:
    """The block with more words at the end of each job's line."""

    def more(found: re.Match[str]) -> str:
        line, comment = found["line"], found["comment"] or ""
        words = short_of(found["job"], shlex.split(line.split(".py", 1)[1])[0], data)
        return f"{line} {shlex.join(words)} {comment}"

    return re.sub(r"(?P<line>python jobs/(?P<job>\w+)\.py(?:\\\n|[^\n#])*)(?P<comment>#[^\n]*)?", more, text)


def on_own_cluster(text: str) -> str:
    """`ray start` and `ray stop` of this block's cluster alone."""
    wait = "until curl -sf -o /dev/null -H @token.header localhost:8265/api/version; do sleep 1; done; sleep 5"
    header = 'printf "Authorization: Bearer %s" "$(cat ~/.ray/auth_token)" > token.header'
    text = text.replace("ray start --head\n", f"{header}\nray start --head --block > head.log & head=$!\n{wait}\n")
    # What `ray stop` removes, too: a later `ray.init` would look for the cluster that is gone.
    return text.replace("ray stop", "kill $head; wait $head || true; rm -f /tmp/ray/ray_current_cluster")


@pytest.fixture(scope="module")
def furnished(checkout: Path) -> Path:
    """The checkout, with the files that the commands speak of."""
    from af2_ray.synth.sounds.render import RENDERERS, render

    test = json.loads((checkout / "data/demo/short/test.json").read_text())
    clip = checkout / "data/demo/short" / test["split_path"] / test["data"]["0"]["name"]
    soundfile.write(checkout / "clip.wav", *soundfile.read(clip))
    shutil.copytree(checkout / "data/demo/short", checkout / "mine")
    for label in list(RENDERERS)[:10]:
        for number in range(8):
            path = checkout / "my/sounds" / label.replace(" ", "_") / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, render(label, np.random.default_rng(number)), 16_000)
    _text_encoder(checkout / "models/flan-t5-large", checkout / "runs/demo/clap/model")
    _esc50(checkout / "ESC-50")
    toy.make(checkout)
    recipe = ROOT / "tests" / "chain" / "chain.yaml"
    few = "[stages.pretrain.steps=4, stages.long.steps=4, clap.steps=4, model.lm.pretrain.steps=4]"
    keys = "{model.cross_attention.every: [1, 2]}"
    sweep = f"name: mine\nrecipe: {recipe}\noverrides: {few}\nkeys: {keys}\nseeds: [0]\nshare: [lm, clap]\n"
    (checkout / "my_sweep.yaml").write_text(sweep)
    return checkout


def _text_encoder(folder: Path, like: Path) -> None:
    """A random T5 with the tokenizer of an AF-CLAP."""
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(like)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _esc50(folder: Path) -> None:
    """Four clips in the layout of ESC-50."""
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for number, category in enumerate(["dog", "rain", "dog", "rain"]):
        noise = np.random.default_rng(number).uniform(-0.5, 0.5, 16_000 * 5)
        soundfile.write(folder / "audio" / f"{number}.wav", noise, 16_000)
        rows.append(f"{number}.wav,1,{number % 2},{category},False,0,A")
    (folder / "meta/esc50.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty HOME: a first-time user's."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_run(document: str, furnished: Path, home: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "HOME": str(home),
        "PYTHONPATH": str(furnished),
        "COLUMNS": "80",
    }
    running: subprocess.Popen[bytes] | None = None
    try:
        for block in blocks(document):
            if block.marker.startswith("not run"):
                continue
            if block.marker.startswith("background"):
                _end(running)
                running = _started(block, furnished, environment)
                continue
            text = block.text
            if block.marker in ("short", "cluster"):
                text = shortened(text, furnished / "toy")
            if block.marker == "cluster":
                _end(running)  # it has the dashboard's port
                text = on_own_cluster(text)
            _run(block, text, furnished, environment)
    finally:
        _end(running)


def _run(block: Block, text: str, folder: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", text] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    print(f"--- {block.place}, {time.monotonic() - started:.0f} s\n{text}\n{done.stdout[-6000:]}")
    assert done.returncode == 0, (
        f"{block.place}: exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    )
    assert '"error"' not in done.stdout, f"{block.place}: {done.stdout[-2000:]}"


def _started(block: Block, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    url = block.marker.split(": ", 1)[1]
    log = folder / "background.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {block.text}"], cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    for _ in range(180):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return process
        except OSError:
            assert process.poll() is None, f"{block.place}: {log.read_text()[-3000:]}"
            time.sleep(1)
    _end(process)
    raise AssertionError(f"{block.place}: {url} does not answer: {log.read_text()[-3000:]}")


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None and process.poll() is None:
        process.send_signal(2)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
