"""Every fixed bug, once."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace

import cuts
import numpy as np
import pytest
import ray
import torch
import toy
from ray.util.placement_group import placement_group, remove_placement_group

from af2_ray import console
from af2_ray.config import SceneSet
from af2_ray.data.batching import plan_captions
from af2_ray.data.collate import ClapBatch, ClapCollator
from af2_ray.data.feed import iter_batches, make_dataset
from af2_ray.data.samples import CaptionSet
from af2_ray.models.afclap import AfClapConfig, AfClapModel
from af2_ray.models.htsat import tower_config
from af2_ray.synth import corpus


def test_the_feed_runs_in_what_the_workers_leave(ray_cluster, make_sound, tiny_tokenizer):
    """Read tasks of `ray.data.range` want a whole CPU each: beside trainers that hold the rest they never started."""
    sets = [CaptionSet(make_sound(f"{n}.flac", hz=200 + n), 0.0, 1.0, f"tone {n}", (), ()) for n in range(4)]
    plan = plan_captions([(sets, 2)], clips_per_row=2, step_batches=1, max_windows=1, seed=0)
    busy = placement_group([{"CPU": 3.5}])
    ray.get(busy.ready(), timeout=60)
    try:
        dataset = make_dataset(plan, ClapCollator(tiny_tokenizer, toy.clap()), decode_cpus=0.25)
        batches = list(iter_batches(dataset.iterator(), ClapBatch))
    finally:
        remove_placement_group(busy)
    assert sorted(batch.row for batch in batches) == [0, 1]


def test_no_parameter_is_a_scalar():
    """DeepSpeed broadcasts parameters as bytes, which a 0-d tensor cannot be viewed as."""
    from transformers import T5Config

    model = AfClapModel(
        AfClapConfig(
            audio_config=tower_config(8, [1, 1, 1, 1], [1, 1, 2, 2]),
            text_config=T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2),
            projection_dim=4,
        )
    )
    assert all(parameter.ndim > 0 for parameter in model.parameters())
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_low_levels_are_rounded_not_cut_to_silence():
    """A bed 60 dB down was digital silence after truncation to int16: -100 dB in the mel, and its spread with it."""

    from af2_ray.synth.scenes import Scene, render_scene
    from af2_ray.synth.sounds.bank import Entry

    class Silence:
        def read(self, entry: Entry, start: int, num: int) -> np.ndarray:
            return np.zeros(num, np.float32)

    entry = Entry.__new__(Entry)
    scene = Scene(0, 0, "order", 1.0, entry)
    assert np.abs(render_scene(scene, Silence())).mean() > 1  # type: ignore[arg-type]


def test_a_pool_ends_its_workers_whatever_the_job_does_on_sigterm(tmp_path, monkeypatch):
    """Workers inherited the job's handler, which raises: the end of the pool waited for one that it had not killed."""
    monkeypatch.setattr(corpus, "Bank", lambda folder: None)
    monkeypatch.setattr(corpus, "_make_block", _on_sigterm)
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        scenes = SceneSet(name="any", split="train", num_scenes=16, duration_s=(10, 10), num_events=(1, 1))
        assert set(corpus._blocks(None, scenes, tmp_path, 2)) == {signal.SIG_DFL}  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.timeout(60)
def test_a_worker_that_is_killed_ends_the_corpus_with_an_error(tmp_path, monkeypatch):
    """A pool put another worker in its place and waited for ever for what the first had been given."""
    monkeypatch.setattr(corpus, "Bank", lambda folder: None)
    monkeypatch.setattr(corpus, "_make_block", _killed)
    scenes = SceneSet(name="any", split="train", num_scenes=16, duration_s=(10, 10), num_events=(1, 1))
    with pytest.raises(RuntimeError, match="any/train was killed: too little memory"):
        list(corpus._blocks(None, scenes, tmp_path, 2))  # type: ignore[arg-type]


def _killed(job: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _on_sigterm(job: object) -> object:
    return signal.getsignal(signal.SIGTERM)


@pytest.mark.parametrize("line", ["tiny --run runs/x seed=1", "tiny seed=1 --run runs/x", "--run runs/x tiny seed=1"])
def test_options_stand_anywhere_among_overrides(line: str) -> None:
    """`RECIPE --run DIR key=value` was refused: argparse takes all positional arguments in one place or none."""
    parser = console.parser("a job")
    parser.add_argument("--run")
    found = parser.parse_args(line.split())
    assert (found.recipe, found.run, found.overrides) == ("tiny", "runs/x", ["seed=1"])


def test_tokens_of_a_row_of_several_texts_are_counted_once() -> None:
    """The mask of texts that stand end to end numbers them: its sum told 2.5 times as many tokens a second."""
    row = cuts.row_of(0, [0], with_fault=False)
    numbered = replace(row, attention_mask=torch.tensor([[1, 1, 2, 2, 2, 3, 0]]))
    assert cuts.TASK.tokens(numbered) == 6
