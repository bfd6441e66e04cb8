"""Sweeps: what is refused before anything runs, and what the report makes of results."""

from __future__ import annotations

import csv
import itertools

import numpy as np
import pytest
import yaml

from af2_ray.config import load_recipe, load_sweep, sweep_names
from af2_ray.evaluate.items import ItemResult, read_items, write_items
from af2_ray.runs.run import Run
from af2_ray.tune.report import best, parts_of, summarise, verdict, write_report
from af2_ray.tune.sweep import SweepRun
from af2_ray.tune.trial import Result, items_path


def write(tmp_path, **changed):
    path = tmp_path / "sweep.yaml"
    settings = {"name": "mine", "recipe": "tiny", "keys": {"model.cross_attention.every": [1, 2]}, "seeds": [0, 1]}
    path.write_text(yaml.safe_dump(settings | changed))
    return path


@pytest.mark.parametrize("name", sweep_names())
def test_shipped_sweeps_are_valid_recipes_in_every_combination(name):
    sweep = load_sweep(name)
    trials = sweep.trials()
    assert sweep.name == name
    assert len({trial.id for trial in trials}) == len(trials)
    assert len(sweep.seeds) >= 3
    for trial in trials:
        assert trial.recipe.seed == trial.seed


def test_keys_and_seeds_reach_the_recipe(tmp_path):
    trials = load_sweep(write(tmp_path)).trials(["corpus=null"])
    assert [(t.recipe.model.cross_attention.every, t.recipe.seed) for t in trials] == [(1, 0), (2, 0), (1, 1), (2, 1)]
    assert all(trial.recipe.corpus is None for trial in trials)


def test_the_base_itself_can_vary(tmp_path):
    trials = load_sweep(write(tmp_path, keys={"recipe": ["mini", "mini-one-stage"]}, seeds=[3])).trials()
    assert [(len(trial.recipe.stages), trial.recipe.seed) for trial in trials] == [(3, 3), (1, 3)]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"keys": {"model.cross_attention.every": [1, 13]}}, "exceeds the LM's 12 layers"),
        ({"keys": {"model.cross_attention.evry": [1]}}, "did you mean 'every'"),
        ({"keys": {"seed": []}}, "at least one"),
        ({"seedz": [1]}, "did you mean 'seeds'"),
        ({"seeds": [1, 1]}, "each once"),
        ({"share": ["lm"], "keys": {"model.lm.hidden_size": [128, 64]}}, "lm is made once"),
        ({"recipe": "tinny"}, "did you mean 'tiny'"),
        ({"overrides": ["evaluation.manifests=[]"]}, "needs evaluation.manifests"),
        ({"overrides": ["evaluation.captions=null"], "metric": "composition"}, "needs clap and evaluation.captions"),
        ({"share": ["lm"], "keys": {"recipe": ["mini", "tiny"]}}, "lm is made once"),
        ({"share": ["lm", "clap"], "keys": {"clap.steps": [500, 600]}}, "clap is made once"),
        ({"share": ["features"]}, "share lm and clap, too"),
        ({"keys": {"recipe": ["tiny", "tinny"]}}, "did you mean 'tiny'"),
    ],
)
def test_a_bad_sweep_is_an_error_before_anything_runs(tmp_path, changed, told):
    with pytest.raises(ValueError) as error:
        load_sweep(write(tmp_path, **changed)).trials()
    assert told in str(error.value)


def test_the_paired_interval_is_free_of_what_points_share():
    """Seeds and questions differ far more than the two points do; paired, they show the difference all the same."""
    results, items = [], {}
    rng = np.random.default_rng(0)
    questions, trainings = rng.random(400), rng.normal(0, 0.2, 3)
    for point, seed in itertools.product(range(2), range(3)):
        name = f"{point}-{seed}"
        values = questions + trainings[seed] + 0.05 * point
        items[name] = [ItemResult("accuracy", str(q), str(q), float(value)) for q, value in enumerate(values)]
        results.append(Result(name, point, {"x": point}, seed, "done", float(values.mean())))
    base, other = summarise(results, items, "accuracy")
    assert other.above == pytest.approx(0.05)
    assert other.above_ci95 == pytest.approx((0.05, 0.05))
    assert np.diff(base.ci95)[0] > 0.1


def test_points_are_compared_over_the_seeds_that_both_have():
    """Seed 1 is the good one; the point of which it alone is left is no better for that."""
    results = [Result(f"0-{s}", 0, {"x": 0}, s, "done", m, m) for s, m in enumerate((1.0, 3.0, 2.0))]
    results += [Result(f"1-{s}", 1, {"x": 1}, s, "stopped", None, 9.0) for s in (0, 2)]
    results.append(Result("1-1", 1, {"x": 1}, 1, "done", 2.9, 2.9))
    _, other = summarise(results, {}, "loss")
    assert other.above == pytest.approx(-0.1)
    assert other.above_ci95 is None, "one seed and no questions: nothing is known of the spread"
    assert best(results, summarise(results, {}, "loss"), "loss").point == 0, "the point with all its seeds"


def test_a_part_that_no_two_trials_share_has_no_score(tmp_path):
    results, folders = make_results(tmp_path, (10, 30))
    items = read_all(folders)
    odd = {name: [*each, ItemResult("other", name, name, 1.0)] for name, each in items.items()}
    assert all(point.mean is None for point in summarise(results, odd, "other"))


def test_other_evaluation_settings_are_another_sweep(tmp_path):
    sweep = load_sweep(write(tmp_path))
    SweepRun(sweep, tmp_path / "out")
    SweepRun(sweep, tmp_path / "out")
    with pytest.raises(ValueError, match="holds another sweep"):
        SweepRun(sweep, tmp_path / "out", ["evaluation.max_windows=3"])


def test_a_run_and_a_sweep_do_not_share_a_folder(tmp_path):
    Run.open(load_recipe("tiny"), tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run, not a sweep; give another --out"):
        SweepRun(load_sweep(write(tmp_path)), tmp_path / "run")
    SweepRun(load_sweep(write(tmp_path)), tmp_path / "sweep")
    with pytest.raises(ValueError, match="holds a sweep, not a run; give another --run"):
        Run.open(load_recipe("tiny"), tmp_path / "sweep")


def test_shared_features_lie_with_the_sweep_and_are_every_trial_s(tmp_path):
    share = ["lm", "clap", "features"]
    sweep = load_sweep(write(tmp_path, recipe="mini", share=share, keys={"recipe": ["mini", "mini-one-stage"]}))
    trials = SweepRun(sweep, tmp_path / "out").trials
    assert {trial.recipe.feature_cache.dir for trial in trials} == {str(tmp_path / "out/shared/features")}
    with pytest.raises(ValueError, match="holds another sweep"):
        SweepRun(sweep, tmp_path / "out", ["clap.steps=600"])


BANDS = ("<=30 s", "30-90 s", "90-300 s")


def read_all(folders):
    return {name: read_items(items_path(folder)) for name, folder in folders.items()}


def make_results(tmp_path, right):
    """Three seeds of two points, each with `right[point]` of 40 questions right; and one trial stopped early."""
    results, folders = [], {}
    for point, share in enumerate(right):
        for seed in range(3):
            name = f"{point:03d}-seed{seed}"
            folders[name] = tmp_path / name
            folders[name].mkdir()
            (folders[name] / "recipe.yaml").write_text(load_recipe("tiny").to_yaml())
            items = [
                ItemResult("accuracy", str(q), str(q // 2), float(q < share), (BANDS[q % 3], "order"))
                for q in range(40)
            ]
            write_items(items_path(folders[name]), [*items, ItemResult("t2a_r1", "q", "q", float(point))])
            values = {"model.cross_attention.every": point + 1}
            results.append(Result(name, point, values, seed, "done", share / 40, 1.0, 5))
    stopped = Result("002-seed0", 2, {"model.cross_attention.every": 3}, 0, "stopped", None, 2.0, 3)
    folders[stopped.id] = tmp_path / stopped.id
    return [*results, stopped], folders


def test_the_report_has_every_trial_and_the_best_recipe_runs(tmp_path):
    results, folders = make_results(tmp_path, (10, 30))
    sweep = load_sweep(write(tmp_path, keys={"model.cross_attention.every": [1, 2, 3]}))
    recipes = {name: load_recipe("tiny", ["seed=7"]) for name in folders}
    page = write_report(tmp_path, sweep, results, folders, recipes).read_text()
    assert page.count("<svg") == 2
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [row["status"] for row in rows] == ["done"] * 6 + ["stopped"]
    assert load_recipe(tmp_path / "best.yaml") == recipes["001-seed0"]
    assert f"--fork {folders['001-seed0']}" in page
    assert "'model.cross_attention.every': 2" in (tmp_path / "best.yaml").read_text()
    assert "<td>90-300 s</td>" in page
    points = summarise(results, read_all(folders), "accuracy")
    assert points[1].above == pytest.approx(0.5)
    assert points[2].mean is None
    assert "every=2 +0.500" in verdict(points, "accuracy")


def test_equal_points_are_called_unresolved(tmp_path):
    results, folders = make_results(tmp_path, (20, 20))
    assert "Not resolved" in verdict(summarise(results, read_all(folders), "accuracy"), "accuracy")


def test_parts_come_from_short_to_long_then_by_name_then_other_measures(tmp_path):
    _, folders = make_results(tmp_path, (10, 30))
    items = read_all(folders)
    assert parts_of(items, "accuracy") == [*(("accuracy", name) for name in (*BANDS, "order")), ("t2a_r1", None)]
