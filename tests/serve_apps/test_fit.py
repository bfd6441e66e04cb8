"""The server's size: a share of what the machine has, or an error that names what is missing."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from af2_ray import cluster
from af2_ray.config import Serve
from serve_apps import af2


def cpus_of(have: dict[str, float] | None, *, clap: bool, **settings: Any) -> float:
    return af2._cpus(Serve(**settings), have, clap=clap)


@pytest.mark.parametrize(
    ("have", "clap", "settings", "cpus"),
    [
        ({"CPU": 2.0}, False, {}, 1.0),
        ({"CPU": 2.0}, True, {}, 0.875),  # model and AF-CLAP share what the ingress leaves of two cores
        ({"CPU": 1.0}, True, {}, 0.375),
        ({"CPU": 8.0}, True, {"min_replicas": 4, "max_replicas": 4}, 1.0),
        ({"CPU": 4.0}, True, {"min_replicas": 4, "max_replicas": 4}, 0.75),
        ({"CPU": 2.0}, True, {"min_replicas": 0}, 0.875),  # none now, one of each when somebody asks
        (None, True, {}, 1.0),  # in a task of a cluster that may be growing
        ({"CPU": 2.0}, True, {"cpus_per_replica": 3.0}, 3.0),
    ],
)
def test_auto_is_a_cpu_or_an_equal_share(have: Any, clap: bool, settings: Any, cpus: float) -> None:
    assert cpus_of(have, clap=clap, **settings) == pytest.approx(cpus, abs=1e-3)


def test_what_auto_takes_fits() -> None:
    for cpus in (0.75, 1, 2, 3, 5):
        for replicas in (1, 2, 3):
            for clap in (False, True):
                settings, have = Serve(min_replicas=replicas, max_replicas=replicas), {"CPU": float(cpus)}
                af2._check_fit(settings, have, af2._cpus(settings, have, clap=clap), 0.0, clap=clap)


@pytest.mark.parametrize(
    ("settings", "clap", "words"),
    [
        ({"cpus_per_replica": 1.0}, True, r"2\.25 CPUs \(there: 2\).*serve\.cpus_per_replica"),
        ({"gpus_per_replica": 1.0}, False, r"1 GPUs \(there: 0\)"),
        ({"min_replicas": 9, "max_replicas": 9, "cpus_per_replica": 0.5}, False, r"4\.75 CPUs.*serve\.min_replicas"),
    ],
)
def test_a_server_that_never_fits_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, settings: Any, clap: bool, words: str
) -> None:
    monkeypatch.setattr(af2, "prospect", lambda: {"CPU": 2.0})
    with pytest.raises(ValueError, match=words):
        af2.build("model", Serve(**settings), "clap" if clap else None)


def test_a_cluster_that_wants_a_token_says_which_commands_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConnectionError, match=r"10\.0\.0\.1:6379.*RAY_AUTH_MODE=token.*ray get-auth-token"):
        cluster.connect()


def test_without_a_cluster_this_machine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "find_bootstrap_address", lambda folder: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "usable_cpus", lambda: 3)
    assert (cluster.prospect() or {})["CPU"] == 3.0


def test_the_cluster_that_would_be_joined_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options["address"]))
    monkeypatch.setattr(ray, "shutdown", lambda: asked.append("left"))
    monkeypatch.setattr(cluster, "capacity", lambda: {"CPU": 64.0})
    assert cluster.prospect() == {"CPU": 64.0}
    assert asked == ["10.0.0.1:6379", "left"]
