"""A base and a small part of it are the whole export, bit by bit; and a part that does not fit says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import tuned
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from af2_ray.config.base import Group
from af2_ray.models.groups import group_of
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration as Model
from af2_ray.models.parts import TRAINED, Base, merge, opened
from af2_ray.storage import parts
from af2_ray.storage.files import DIGESTS, Damaged, sealed_json, write_digests
from af2_ray.storage.parts import check_base, is_part, read_facts
from af2_ray.storage.stores import local_model
from af2_ray.storage.weights import weights_digest


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return tuned.export_base(tmp_path_factory.mktemp("base") / "model", tiny_tokenizer)


@pytest.fixture(scope="module")
def whole_and_part(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, Path]:
    whole, part = tuned.stage(base, tmp_path_factory.mktemp("stage"))
    return Path(whole), Path(part)


@pytest.fixture
def copied(whole_and_part: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the part, to be damaged."""
    return Path(shutil.copytree(whole_and_part[1], tmp_path / "part"))


def files(folder: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def assert_same_files(one: Path | str, two: Path | str) -> None:
    assert files(one).keys() == files(two).keys()
    for name, data in files(one).items():
        assert data == files(two)[name], name


# --- Whole again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "groups",
    [("lora",), tuned.GROUPS, ("transform", "tokens"), ("clap", "xattn"), ("lm", "xattn")],
    ids="-".join,
)
@pytest.mark.parametrize("base_type", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("export_type", [torch.float32, torch.bfloat16], ids=["to_fp32", "to_bf16"])
def test_base_and_part_are_the_whole_export(
    tmp_path: Path, tiny_tokenizer: Any, groups: tuple[str, ...], base_type: torch.dtype, export_type: torch.dtype
) -> None:
    """Every file is the same, weights, configuration, processor and digests; what did not train is not in the part."""
    base = tuned.export_base(tmp_path / "base", tiny_tokenizer, dtype=base_type)
    before = files(base)
    whole, part = tuned.stage(base, tmp_path / "stage", groups=groups, dtype=export_type)
    merge(base, part, tmp_path / "merged")
    assert_same_files(whole, tmp_path / "merged")
    assert files(base) == before, "its files are mapped, and nothing is written to them"
    facts = read_facts(part)
    assert facts.groups == tuple(sorted(groups))
    own = load_file(f"{part}/{TRAINED}") if set(groups) != {"lora"} else {}
    assert {group_of(name) for name in own} == set(groups) - {"lora"}
    assert facts.base == weights_digest(base)
    assert facts.trained == {"run": "tiny", "stage": "toy", "steps": 4, "recipe": facts.trained["recipe"]}
    assert not {name for name in files(part) if name.startswith("tokenizer")}, "the base has them"


def test_shards_and_settings_of_the_base(tmp_path: Path, base: Path) -> None:
    """A base in shards, and a stage whose small files are not the base's: its own travel with the part."""
    sharded = tmp_path / "sharded"
    shutil.copytree(base, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    Model.from_pretrained(base).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    start = Path(shutil.copytree(base, tmp_path / "start"))
    config = json.loads((start / "config.json").read_text()) | {"max_windows": 60}
    (start / "config.json").write_text(json.dumps(config))
    (start / "chat_template.jinja").write_text("{{ messages }}")
    whole, part = tuned.stage(sharded, tmp_path / "stage", start=start)
    merge(sharded, part, tmp_path / "merged")
    assert_same_files(whole, tmp_path / "merged")
    assert {"config.json", "chat_template.jinja"} <= files(part).keys()
    assert Model.from_pretrained(tmp_path / "merged").config.max_windows == 60
    merge(base, part, tmp_path / "again")  # the same weights, otherwise stored
    assert_same_files(whole, tmp_path / "again")
    with opened(part, Base(str(base), Model.from_pretrained(base))) as (model, small):
        assert model.config.max_windows == 60
        assert (small / "chat_template.jinja").read_text() == "{{ messages }}"


def test_two_stages_are_one_part(tmp_path: Path, base: Path) -> None:
    """The second stage's part is of the run's base: what the first merged is in it as whole matrices."""
    first, _ = tuned.stage(base, tmp_path / "first", seed=1)
    whole, part = tuned.stage(base, tmp_path / "second", start=first, seed=2)
    merge(base, part, tmp_path / "merged")
    assert_same_files(whole, tmp_path / "merged")
    assert {"lm", "lora"} <= set(read_facts(part).groups)


def test_a_store_is_as_good_as_a_disk(tmp_path: Path, base: Path) -> None:
    whole, part = tuned.stage(base, "memory://parts/stage")
    assert is_part(part)
    assert not is_part(whole)
    merge(base, part, "memory://parts/merged")
    assert_same_files(local_model(whole), local_model("memory://parts/merged"))


def test_peft_puts_the_adapters_on_the_bare_lm(base: Path, whole_and_part: tuple[Path, Path], tmp_path: Path) -> None:
    whole, part = whole_and_part
    state = Model.from_pretrained(base).language_model.state_dict()
    config = Model.from_pretrained(base).config.text_config
    lm = AutoModelForCausalLM.from_config(config).eval()
    lm.load_state_dict(
        {
            name.replace(".decoder_layer.", "."): value
            for name, value in state.items()
            if ".cross_attention." not in name
        }
    )
    ids = torch.arange(40)[None]
    bare = lm(ids).logits
    merged = Model.from_pretrained(whole)
    expected = merged.language_model(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(lm, str(part)).eval()
    assert not torch.allclose(adapted(ids).logits, bare, atol=1e-2)
    torch.testing.assert_close(adapted(ids).logits, expected, atol=1e-4, rtol=0)
    adapted.save_pretrained(tmp_path)
    theirs, ours = load_file(tmp_path / "adapter_model.safetensors"), load_file(part / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    theirs, ours = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, part))
    assert {**theirs, "target_modules": sorted(theirs["target_modules"])} == {
        **ours,
        "base_model_name_or_path": theirs["base_model_name_or_path"],
    }


# --- On its base -------------------------------------------------------------------------------------------------


def test_a_part_shares_what_it_has_not(base: Path, whole_and_part: tuple[Path, Path]) -> None:
    whole, part = whole_and_part
    shared = Base(str(base), Model.from_pretrained(base).eval())
    before = {name: value.clone() for name, value in shared.model.state_dict().items()}
    with opened(part, shared) as (model, _):
        pass
    theirs = dict(shared.model.named_parameters())
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        is_shared = plain in theirs and parameter.data_ptr() == theirs[plain].data_ptr()
        assert is_shared is (group_of(name) not in tuned.GROUPS), name
    assert model.audio_tower is shared.model.audio_tower
    ids = torch.arange(20)[None]
    expected = Model.from_pretrained(whole)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in shared.model.state_dict().items())


@pytest.mark.parametrize("groups", [("clap",), ("lm",), ("tokens",)])
def test_a_part_of_any_group_answers_as_its_whole(tmp_path: Path, base: Path, groups: tuple[str, ...]) -> None:
    """Without adapters the weights are the same, and so is every bit of what the model says."""
    whole, part = tuned.stage(base, tmp_path, groups=groups)
    with opened(part, Base(str(base), Model.from_pretrained(base).eval())) as (model, _):
        pass
    ids, windows = torch.arange(20)[None] % 7, torch.randint(-9000, 9000, (2, 160_000), dtype=torch.int16)
    ids[0, 0] = model.config.audio_token_id
    with torch.inference_mode():
        ours, theirs = (
            one(ids, waveforms=windows, windows_per_clip=[2]).logits for one in (model, Model.from_pretrained(whole))
        )
    assert torch.equal(ours, theirs)


# --- What does not fit -------------------------------------------------------------------------------------------


def resealed(part: Path, **facts: Any) -> None:
    """Write other facts into a part, as its writer would have."""
    found = json.loads((part / "part.json").read_text()) | facts
    found.pop("seal")
    (part / "part.json").write_text(sealed_json(found))
    write_digests(part)


def test_a_part_of_another_base(tmp_path: Path, base: Path, copied: Path, tiny_tokenizer: Any) -> None:
    other = tuned.export_base(tmp_path / "other", tiny_tokenizer, seed=9)
    with pytest.raises(ValueError, match="name the model that the part was trained from") as raised:
        merge(other, copied, tmp_path / "out")
    for named in (str(other), str(copied), str(base), weights_digest(base)[:12], weights_digest(other)[:12]):
        assert named in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["trained.safetensors", "adapter_model.safetensors", "adapter_config.json", "part.json"]
)
def test_a_damaged_file_is_named(tmp_path: Path, base: Path, copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[-9] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(Damaged, match=rf"{name} is damaged.*put back a copy"):
        merge(base, copied, tmp_path / "out")
    (copied / name).unlink()
    with pytest.raises(ValueError, match=r"is missing|no small part in .*with part\.json"):
        merge(base, copied, tmp_path / "out")
    (copied / DIGESTS).unlink()  # by hand; then the file's own reader finds it
    with pytest.raises(ValueError, match=r"is missing|no small part in"):
        merge(base, copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_part_says_must_be_known(tmp_path: Path, base: Path, copied: Path) -> None:
    resealed(copied, groups=["lora", "bridge"])
    with pytest.raises(ValueError, match=r"has the groups \['bridge'\].*use the version of af2_ray that wrote it"):
        merge(base, copied, tmp_path / "out")
    resealed(copied, groups=["lora"], format=2)
    with pytest.raises(ValueError, match="has format 2, and this version knows 1"):
        merge(base, copied, tmp_path / "out")
    resealed(copied, format=1, dtype="int8")
    with pytest.raises(Damaged, match="dtype='int8'"):
        merge(base, copied, tmp_path / "out")
    resealed(copied, dtype="float32", files=["../secret"])
    with pytest.raises(ValueError, match="no name of a file"):
        merge(base, copied, tmp_path / "out")
    resealed(copied, files=["nowhere.json"])
    with pytest.raises(Damaged, match=r"nowhere\.json is neither in"):
        merge(base, copied, tmp_path / "out")
    resealed(copied, files=7)
    with pytest.raises(Damaged, match=r"part\.json is damaged"):
        merge(base, copied, tmp_path / "out")
    assert set(parts.GROUPS) == {*get_args(Group), "mel"}


def test_tensors_and_adapters_must_be_the_models(tmp_path: Path, base: Path, copied: Path) -> None:
    own = load_file(copied / TRAINED)
    save_file(own | {"bridge.weight": torch.ones(2)}, copied / TRAINED)
    write_digests(copied)
    with pytest.raises(ValueError, match=r"bridge\.weight of shape \[2\], which the base has not"):
        merge(base, copied, tmp_path / "out")
    save_file(own, copied / TRAINED)
    config = json.loads((copied / "adapter_config.json").read_text())
    for change in ({"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}, {"rank_pattern": {"q_proj": 8}}):
        (copied / "adapter_config.json").write_text(json.dumps(config | change))
        write_digests(copied)
        with pytest.raises(ValueError, match="is not supported"):
            merge(base, copied, tmp_path / "out")
    (copied / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
    write_digests(copied)
    with pytest.raises(ValueError, match="it is of another LM"):
        merge(base, copied, tmp_path / "out")


def test_folders_that_are_taken_for_others(tmp_path: Path, base: Path, whole_and_part: tuple[Path, Path]) -> None:
    whole, part = whole_and_part
    with pytest.raises(ValueError, match=r"is a small part of a model.*jobs/merge\.py"):
        local_model(part)
    with pytest.raises(ValueError, match="no small part in"):
        merge(base, whole, tmp_path / "out")
    with pytest.raises(ValueError, match="is there already"):
        merge(base, part, base)
    with pytest.raises(ValueError, match="is a small part of a model"):
        check_base(part, read_facts(part), part)
    with pytest.raises(ValueError, match="no model in"):
        merge(tmp_path, part, tmp_path / "out")
