"""The model card of a run: what an export was made from, how, and under which licences.

A Hugging Face card (`README.md` beside the weights, metadata in its YAML head), written from what the run itself has on
disk, so it says nothing that nobody measured. Licences come from the recipe's `licences` (models and manifests that
were brought along) and from the corpus's `sources.csv` (recordings that a corpus was made of); what has none is listed
as not stated, never left out.
"""

from __future__ import annotations

import csv
import json
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

import af2_ray
from af2_ray.config import NOT_STATED, Recipe
from af2_ray.runs.run import Run, finished
from af2_ray.storage.files import write_whole
from af2_ray.storage.places import locate


def write_card(run: Run) -> Path:
    """Write the card of a finished run's model beside its weights, and return its path."""
    path = run.model_dir / "README.md"
    write_whole(path, model_card(run))
    return path


def model_card(run: Run) -> str:
    """The card as Markdown; a step that is not finished is left out of its tables."""
    recipe = run.recipe
    sections = [
        _head(recipe),
        f"# {recipe.serve.model_name}",
        "An audio-language model after [Audio Flamingo 2](https://arxiv.org/abs/2503.03983): it takes a recording and "
        "a question, and answers in text. AF-CLAP hears the recording in windows of 10 seconds; a frozen language "
        "model attends to what it hears by gated cross-attention.",
        "## How it was made",
        f"Recipe `{recipe.name}` (fingerprint `{recipe.fingerprint()}`, seed {recipe.seed}), {code_version()}.",
        _table(("part", "from", "licence"), _parts(recipe)),
        _table(
            ("step", "windows", "trains", "steps", "loss, first to last", "clips", "starts from", "plan"), _steps(run)
        ),
        "A plan's fingerprint stands for the samples of a step, their order and their batches.",
        "## What it was trained on",
        _table(("manifest", "weight", "used in", "licence"), _manifests(recipe)),
        *_recordings(recipe),
        "## How to use it",
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoProcessor\n\n"
        "from af2_ray.models import modeling_af2, processing_af2  # makes them known to transformers\n\n"
        'model, processor = AutoModelForCausalLM.from_pretrained("."), AutoProcessor.from_pretrained(".")\n'
        "```",
        "`python jobs/ask.py MODEL FILE QUESTION` asks it one question, `jobs/evaluate.py MODEL MANIFEST` many, and "
        "`serve_apps/af2.py` serves it over HTTP.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def code_version() -> str:
    """The package's version, and the commit where it runs from a git checkout."""
    folder = Path(__file__).parent
    version = f"af2_ray {af2_ray.__version__}"
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty=, changed", "--exclude=*"]
        described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return version  # no git on a cluster's image: the version has to do
    return f"{version} (commit {described.stdout.strip()})" if described.returncode == 0 else version


def _head(recipe: Recipe) -> str:
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "audio-text-to-text",
        "license": "other",
        "license_name": "see-what-it-was-made-from",
        "tags": ["audio", "audio-question-answering", "af2_ray"],
    }
    if base := recipe.model.start or recipe.model.lm.path:
        head["base_model"] = base
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def _parts(recipe: Recipe) -> Iterable[Sequence[str]]:
    """Language model, tower and text encoder: made here, or brought along, alone or as parts of a whole model."""
    if recipe.model.start is not None:
        yield f"the whole model (weights {recipe.model.start_digest})", *_origin(recipe, recipe.model.start)
        return
    lm = recipe.model.lm
    yield "language model", *_origin(recipe, lm.path or lm.package)
    yield "audio encoder", *_origin(recipe, recipe.model.audio.weights)
    if recipe.clap and recipe.model.audio.weights is None:
        yield "text encoder of AF-CLAP (not in the export)", *_origin(recipe, recipe.clap.text.path)


def _origin(recipe: Recipe, name: str | None) -> tuple[str, str]:
    return (f"`{name}`", recipe.licence_of(name)) if name else ("trained in this run", "that of its data")


def _steps(run: Run) -> Iterable[Sequence[str]]:
    recipe = run.recipe
    before = "AF-CLAP and language model" if recipe.model.start is None else f"`{recipe.model.start}`"
    if facts := finished(run.lm_dir):
        yield (
            "language model",
            "",
            "all",
            *_numbers(facts),
            "nothing" if recipe.model.lm.pretrain else "its weights",
            "",
        )
    if recipe.clap and (facts := finished(run.clap_dir)):
        yield "AF-CLAP", "1", "all", *_numbers(facts), "nothing", f"`{facts['plan']}`"
    for stage in recipe.stages:
        if facts := finished(run.stage_dir(stage.name)):
            trains = ", ".join(stage.trainable)
            yield stage.name, str(stage.max_windows), trains, *_numbers(facts), before, f"`{facts['plan']}`"
        before = stage.name


def _numbers(facts: dict[str, Any]) -> tuple[str, str, str]:
    losses = f"{facts['loss_first']:.3f} to {facts['loss_last']:.3f}" if "loss_last" in facts else ""
    return str(facts["steps"]), losses, f"{facts['num_clips']:,}" if "num_clips" in facts else ""


def _manifests(recipe: Recipe) -> Iterable[Sequence[str]]:
    captions = (*recipe.clap.warmup_captions, *recipe.clap.captions) if recipe.clap else ()
    uses: dict[str, list[tuple[str, float]]] = {}
    for step, datasets in (("AF-CLAP", captions), *((stage.name, stage.data) for stage in recipe.stages)):
        for dataset in datasets:
            uses.setdefault(dataset.manifest, []).append((step, dataset.weight))
    for manifest, found in uses.items():
        weights = ", ".join(f"{weight:g}" for _, weight in found)
        made_here = recipe.corpus is not None and Path(recipe.corpus.dir) in Path(manifest).parents
        licence = "that of its recordings, below" if made_here else recipe.licence_of(manifest)
        yield f"`{manifest}`", weights, ", ".join(step for step, _ in found), licence


def _recordings(recipe: Recipe) -> Iterable[str]:
    """The recordings that a corpus was composed of, counted by package and licence; nothing without a corpus."""
    if recipe.corpus is None:
        return
    fs, folder = locate(recipe.corpus.dir)
    if fs.isfile(f"{folder}/corpus.json"):
        report = json.loads(fs.cat_file(f"{folder}/corpus.json"))["report"]
        size = f"{report['hours']:.1f} hours composed from {report['num_source_clips']} recordings"
        yield f"The corpus `{recipe.corpus.dir}`: {size} (SHA-256 `{report['sha256'][:16]}`). Those of its training:"
    if fs.isfile(f"{folder}/sources.csv"):
        with fs.open(f"{folder}/sources.csv", "rt", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
        counts = Counter((row["package"], row["licence"] or NOT_STATED) for row in rows)
        yield _table(
            ("recordings", "number", "licence"), ((p, str(n), licence) for (p, licence), n in sorted(counts.items()))
        )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = [" | ".join(row) for row in rows]
    lines = [" | ".join(header), " | ".join("---" for _ in header), *body]
    return "\n".join(f"| {line} |" for line in lines) if body else ""
