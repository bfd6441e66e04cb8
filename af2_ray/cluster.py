"""The Ray cluster: whether a recipe fits on it, said in seconds instead of waiting for ever; rows to results.

Ray itself keeps an infeasible request pending without end. An autoscaling cluster is asked for what it may grow to, not
for what it has now.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.services import find_bootstrap_address

from af2_ray.config import Cluster
from af2_ray.machine import usable_cpus
from af2_ray.storage.places import environment

WAIT_S = 20.0  # for nodes that are joining, and for what an ended job still holds
TRIAL_CPUS = 0.1  # what a sweep's trial holds itself, beside its job's workers and decode task


def connect(**options: Any) -> Any:
    """`ray.init`, whose refusals say what mends them. Its workers may open what this process may (`places.allow`).

    Raises:
        ConnectionError: a cluster is named (`RAY_ADDRESS`) or runs on this machine, and does not take this process.
    """
    if allowed := _lacking(environment()):
        env = dict(options.get("runtime_env") or {})
        options["runtime_env"] = env | {"env_vars": allowed | env.get("env_vars", {})}
    try:
        return ray.init(**options)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise ConnectionError(
            f"{str(error).splitlines()[0]}: is it up (`ray status`)? One that wants a token is joined with `export "
            "RAY_AUTH_MODE=token` and its token in ~/.ray/auth_token; `ray get-auth-token` there tells it"
        ) from error


def _lacking(variables: dict[str, str]) -> dict[str, str]:
    """The variables that the job's own runtime environment does not set: Ray takes none twice.

    Raises:
        ValueError: it sets one to another value.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    given = (job.get("runtime_env") or {}).get("env_vars") or {}
    for name, value in variables.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"the job's runtime environment has {name}={given[name]}, and its recipe wants {value}: set that there"
            )
    return {name: value for name, value in variables.items() if name not in given}


def needed(cluster: Cluster, *, use_gpu: bool, in_sweep: bool = False) -> dict[str, float]:
    """CPUs and GPUs of a job, or of a sweep's trial: the workers and one decode task."""
    cpus = cluster.num_workers * cluster.cpus_per_worker + cluster.decode_cpus + (TRIAL_CPUS if in_sweep else 0)
    return {"CPU": cpus} | ({"GPU": float(cluster.num_workers)} if use_gpu else {})


def capacity() -> dict[str, float]:
    """What the connected cluster has, or may grow to where it has an autoscaler."""
    have: dict[str, float] = dict(ray.cluster_resources())
    most = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return {name: max(have.get(name, 0.0), float(most.get(name, 0.0))) for name in {*have, *most}}


def prospect() -> dict[str, float] | None:
    """What the connected cluster has; where none is, what one would have that runs already, or this machine.

    None in a task or an actor of a cluster, whose nodes may be on their way yet.
    """
    if ray.is_initialized():
        return None if ray._private.worker.global_worker.mode == ray.WORKER_MODE else capacity()
    address = os.environ.get("RAY_ADDRESS") or find_bootstrap_address(None)  # as `ray.init` chooses
    if address in (None, "local"):
        import torch  # a server's ingress does without

        return {"CPU": float(usable_cpus()), "GPU": float(torch.cuda.device_count())}
    connect(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        return capacity()
    finally:
        ray.shutdown()


def uses_gpu(cluster: Cluster) -> bool:
    """Whether a job of this recipe takes GPUs; `auto` takes them where there are enough."""
    return cluster.gpus == "yes" or (cluster.gpus == "auto" and capacity().get("GPU", 0) >= cluster.num_workers)


def worker_env(cluster: Cluster) -> dict[str, dict[str, str]]:
    """The runtime environment of a job's workers. Ray leaves a node's GPUs in sight of those that were given none."""
    if uses_gpu(cluster) or not capacity().get("GPU"):
        return {}
    return {"env_vars": {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}}


def own_device() -> str:
    """`cuda` in a Ray actor or task that was given a GPU, `cpu` in one that was not; outside of Ray `auto`."""
    if not ray.is_initialized():
        return "auto"
    return "cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu"


@dataclass(frozen=True)
class Actors:
    """The workers of a Ray Data job: how many, and what each takes."""

    num: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    threads: int = 1

    @classmethod
    def of(cls, cluster: Cluster) -> Actors:
        """As many, and as large, as the workers that a recipe trains with."""
        gpus = 1.0 if uses_gpu(cluster) else 0.0
        return cls(cluster.num_workers, cluster.cpus_per_worker, gpus, cluster.threads_per_worker)

    @staticmethod
    def gpus_there() -> float:
        """One GPU each where the connected cluster has any."""
        return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def map_on_ray(
    rows: Sequence[Mapping[str, Any]],
    worker: type[Any],
    args: Sequence[Any],
    actors: Actors,
    *,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    prepare_cpus: float = 0.25,
) -> Iterator[dict[str, Any]]:
    """Results of rows on the connected cluster, each as it is done: a row is one task of one actor.

    Args:
        worker: class that each actor makes once, with `args`, and then calls with each of its rows.
        prepare: a function of a row that runs before, in tasks of `prepare_cpus` each: decoding, for instance.
    """
    import ray.data

    if not rows:
        return
    dataset = ray.data.from_items([dict(row) for row in rows], override_num_blocks=len(rows))
    if prepare is not None:
        dataset = dataset.map(prepare, num_cpus=prepare_cpus)
    done = dataset.map(
        worker,
        fn_constructor_args=tuple(args),
        compute=ray.data.ActorPoolStrategy(size=min(actors.num, len(rows)), max_tasks_in_flight_per_actor=2),
        num_cpus=actors.cpus,
        num_gpus=actors.gpus or None,
    )
    yield from done.iter_rows()


def workers_that_fit(cluster: Cluster, *, use_gpu: bool) -> int:
    """How many workers the nodes hold, each on one node."""
    worker = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in worker.items()) for node in nodes)


def shortage(need: Mapping[str, float], have: Mapping[str, float]) -> str:
    """What is missing, in words; empty if nothing is."""
    lacking = {name: amount for name, amount in need.items() if have.get(name, 0.0) < amount - 1e-6}
    return " and ".join(f"{amount:g} {name}s (there: {have.get(name, 0.0):g})" for name, amount in lacking.items())


def preflight(cluster: Cluster, *, wait_s: float = WAIT_S, in_sweep: bool = False) -> None:
    """Fail if the cluster can never hold the recipe's workers, or does not have them free within `wait_s` seconds.

    Args:
        in_sweep: whether the workers are of a trial, which holds a little itself.

    Raises:
        ValueError: the recipe asks for more than the cluster has or may grow to; the message names what is missing.
        RuntimeError: it has enough, but other work (or what is left of it) holds it.
    """
    num_workers = cluster.num_workers
    need = needed(cluster, use_gpu=uses_gpu(cluster), in_sweep=in_sweep)
    end = time.monotonic() + wait_s
    while (missing := shortage(need, capacity())) and time.monotonic() < end:
        time.sleep(min(1.0, wait_s))
    if missing:
        raise ValueError(
            f"the recipe needs {missing} more than this Ray cluster can give: cluster.num_workers="
            f"{num_workers} of {cluster.cpus_per_worker:g} CPUs; lower them, or start more nodes"
        )
    if shortage(need, ray.cluster_resources()):
        return  # the autoscaler has to bring the nodes first
    if capacity() == ray.cluster_resources() and workers_that_fit(cluster, use_gpu=uses_gpu(cluster)) < num_workers:
        raise ValueError(
            f"{num_workers} workers of {cluster.cpus_per_worker:g} CPUs: each has to fit on one node, and the nodes of "
            "this cluster have enough only together; lower cluster.cpus_per_worker, or start larger nodes"
        )
    while (missing := shortage(need, ray.available_resources())) and time.monotonic() < end:
        time.sleep(min(1.0, wait_s))
    if missing:
        raise RuntimeError(
            f"{missing} are free too few: other jobs hold the rest; `ray status` shows them, wait or end them"
        )


def max_trials(cluster: Cluster) -> int:
    """How many trials of this size the cluster holds at a time, at least 1."""
    have, need = capacity(), needed(cluster, use_gpu=uses_gpu(cluster), in_sweep=True)
    return max(1, min(int(have.get(name, 0) / amount + 1e-6) for name, amount in need.items()))
