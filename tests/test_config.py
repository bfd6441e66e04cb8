"""Recipes: what is accepted, what is refused, and that the refusal helps."""

from __future__ import annotations

import pytest

from af2_ray.config import RECIPE_DIR, Recipe, load_recipe, recipe_names
from af2_ray.config.base import later

FINGERPRINTS = {  # since version 0.1.0: another one refuses every run that people have
    "af2-0.5b": "ddc71f6aa0c080e2",
    "af2-1.5b": "cccaf65b6c910884",
    "af2-3b": "f01283afdc037aa5",
    "af2-3b-one-stage": "bcb474a68c93e439",
    "af2-3b-two-stages": "f898009ab9596c8c",
    "finetune": "29ce7863631820a1",
    "finetune-full": "186c3a4150ad09ba",
    "finetune-lora": "37c3dc74c9e3be6e",
    "mini": "275c0ba08bfc560d",
    "mini-one-stage": "32e4e184ef225102",
    "mini-two-stages": "d6760bf4bf216658",
    "small": "ad9f2229537d8ee4",
    "tiny": "d9da30f714f209d7",
}


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_survive_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    saved = tmp_path / "recipe.yaml"
    saved.write_text(recipe.to_yaml())
    assert load_recipe(saved) == recipe
    assert recipe.name == name


def test_the_paper_s_figures():
    recipe = load_recipe("af2-3b")
    assert [stage.max_windows for stage in recipe.stages] == [3, 9, 30]
    assert ["clap" in stage.trainable for stage in recipe.stages] == [False, True, False]
    assert recipe.model.audio.depths == [2, 2, 12, 2]
    assert (recipe.clap.num_positives, recipe.clap.num_negatives, recipe.clap.batch_size) == (3, 3, 256)
    assert recipe.stages[0].optimizer.lr == 1e-4
    assert recipe.stages[0].optimizer.warmup_steps == 1875


def test_overrides_reach_into_lists_by_name_and_by_index():
    recipe = load_recipe("tiny", ["stages.pretrain.steps=5", "stages.1.optimizer.lr=1e-4", "seed=7"])
    assert recipe.stages[0].steps == 5
    assert recipe.stages[1].optimizer.lr == 1e-4
    assert recipe.seed == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stagess=1", "did you mean 'stages'"),
        ("model.audio.embed_dimm=2", "model.audio.embed_dimm: unknown key; did you mean 'embed_dim'"),
        ("stages.pretrain.optimizer.learing_rate=2", "stages.0.optimizer.learing_rate: unknown key"),
        ("stages.pretrain.steps=many", "stages.0.steps"),
        ("stages.pretrain.steps='5'", "stages.0.steps"),
        ("stages.pretrian.steps=2", "no item 'pretrian'"),
        ("stages.pretrain.trainable=[clip]", "'clap'"),
        ("cluster.num_workers=7", "multiple of cluster.num_workers"),
        ("model.cross_attention.every=13", "exceeds the LM's 12 layers"),
        ("model.lm.path=x", "exactly one of path, package, pretrain"),
        ("seed", "write it as key=value"),
        ("serve.audio_url_hosts=[*]", "the value is not YAML"),
        ("stages.pretrain.trainable=[clap", "the value is not YAML"),
        ("seed.x=1", "is a value, not a block"),
        ("faults.max_bad_share=2", "faults.max_bad_share"),
        ("deepspeed.zero_stage=1", "stages.pretrain.optimizer.muon_lr works on whole fp32 matrices"),
        ("model.lm.pretrain.drill_share=0.8", "model.lm.pretrain: reading_share=0.35 and drill_share=0.8"),
        ("model.audio.patch_size=8", "depths and num_heads need 3 numbers each"),
        ("model.audio.patch_size=5", "model.audio.patch_size"),
        ("clap.augment.noise_snr_db=[30, 20]", "a range [least, most] of dB"),
        ("clap.optimizer.muon_groups=[xattn]", "clap.optimizer.muon_lr has nothing to train"),
    ],
)
def test_a_bad_key_or_value_is_named(override, message):
    with pytest.raises(ValueError) as error:
        load_recipe("tiny", [override])
    assert message in str(error.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        load_recipe("tinny")


def test_a_key_given_twice_is_an_error(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text((RECIPE_DIR / "tiny.yaml").read_text() + "\nseed: 1\n")
    with pytest.raises(ValueError, match="'seed' is given twice"):
        load_recipe(path)


def test_a_base_that_is_itself_is_an_error(tmp_path):
    path = tmp_path / "loop.yaml"
    path.write_text(f"base: {path}\nname: loop\n")
    with pytest.raises(ValueError, match="its own base"):
        load_recipe(path)


def test_the_fingerprint_leaves_out_what_does_not_decide_the_weights():
    one = load_recipe("tiny")
    assert one.fingerprint() == load_recipe("tiny", ["storage=elsewhere", "serve.model_name=x"]).fingerprint()
    assert one.fingerprint() != load_recipe("tiny", ["seed=1"]).fingerprint()


@pytest.mark.parametrize("name", recipe_names())
def test_runs_of_shipped_recipes_go_on(name):
    assert load_recipe(name).fingerprint() == FINGERPRINTS[name]


def test_a_key_that_came_later_changes_nothing_while_it_has_its_default():
    stage = Recipe.model_fields["stages"].annotation.__args__[0]

    class NewStage(stage):
        warp: float = later(0.0)

    class NewRecipe(Recipe):
        stages: list[NewStage]
        echo: bool = later(False)

    facts = load_recipe("tiny").model_dump()
    assert NewRecipe(**facts).fingerprint() == FINGERPRINTS["tiny"]
    assert NewRecipe(**facts, echo=True).fingerprint() != FINGERPRINTS["tiny"]
    facts["stages"] = [block | {"warp": 0.5} for block in facts["stages"]]
    assert NewRecipe(**facts).fingerprint() != FINGERPRINTS["tiny"]


def test_columns_of_a_manifest_are_part_of_a_run_that_names_them():
    data = "stages.long.data=[{manifest: t.csv%s}]"
    plain, empty, named = (
        load_recipe("tiny", [data % more]) for more in ("", ", columns: {}", ", columns: {audio: f}")
    )
    assert plain.fingerprint() == empty.fingerprint() != named.fingerprint()
    assert named.stages[-1].data[0].columns == {"audio": "f"}


@pytest.mark.parametrize(
    "override",
    ["faults.max_bad_share=0.5", "faults.max_failures=9", "stages.long.checkpoint_every=1", "clap.checkpoint_every=1"],
)
def test_what_may_fail_and_what_is_kept_on_the_way_may_change_in_mid_run(override):
    assert load_recipe("tiny", [override]).fingerprint() == load_recipe("tiny").fingerprint()
