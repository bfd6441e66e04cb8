"""Other fusions and adapters through Ray and DeepSpeed: a few steps, and the export read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toy

from af2_ray.config import load_recipe
from af2_ray.models.groups import group_of
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration as Model
from af2_ray.models.parts import merge
from af2_ray.runs.run import Run
from af2_ray.storage.parts import read_facts
from af2_ray.train.stages import train_run

STAGE = (
    "{{name: only, max_windows: 2, data: [{{manifest: {manifest}}}], steps: 3, checkpoint_every: 2, {trains}, "
    "optimizer: {{lr: 1e-2, warmup_steps: 0}}, "
    "budget: {{windows_per_row: 6, text_tokens_per_row: 512, questions_per_clip: 2, step_batches: 2}}}}"
)
CASES = {
    "lora": ("trainable: [lora, xattn, transform, tokens], lora: {rank: 4}", []),
    "prefix": ("trainable: [xattn, transform, tokens]", ["model.fusion=prefix"]),
    "zero3": ("trainable: [clap, xattn, transform, tokens]", ["deepspeed.zero_stage=3"]),
}
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def should_train(name: str, case: str) -> bool:
    """Whether a stage of `case` changes the tensor of this name in its export, where adapters are merged."""
    group = group_of(name)
    if group == "lm":
        return case == "lora" and name.split(".")[-2] in LORA_TARGETS and name.endswith("weight")
    return group in ("xattn", "transform", "tokens")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_export_has_what_trained_and_the_rest_bit_for_bit(ray_cluster: Any, tmp_path: Path, case: str) -> None:
    corpus = toy.make(tmp_path)
    trains, overrides = CASES[case]
    kept = [item for item in toy.overrides(corpus, tmp_path) if not item.startswith("stages.")]
    stage = STAGE.format(manifest=corpus / "train.json", trains=trains)
    run = Run.open(load_recipe("tiny", [*kept, *overrides, f"stages=[{stage}]"]), tmp_path / "run")
    facts = train_run(run)[-1]
    assert facts["steps"] == 3
    before = Model.from_pretrained(run.start_dir / "model")
    after = Model.from_pretrained(run.stage_dir("only") / "model")
    assert after.config.fusion == ("prefix" if case == "prefix" else "xattn")
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    changed = {name for name, tensor in new.items() if not tensor.equal(old[name])}
    assert all(tensor.isfinite().all() for tensor in new.values())
    assert any(group_of(name) == "clap" for name in changed) is (case == "zero3")
    rest = {name for name in new if group_of(name) not in ("clap", "mel")}  # not all of the tower is used
    assert changed & rest == {name for name in rest if should_train(name, case)}
    part = run.stage_dir("only") / "part"
    assert part.exists() is (case == "lora")
    if case == "lora":
        merge(run.start_dir / "model", part, tmp_path / "merged")
        assert files(tmp_path / "merged") == files(run.stage_dir("only") / "model")
        assert read_facts(part).trained["stage"] == "only"


def files(folder: Path) -> dict[str, bytes]:
    """What is in a folder but the card, which is written when the run is over."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".md"}
