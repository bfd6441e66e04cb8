"""What a job asks of the Ray cluster, checked before it would wait for ever."""

from __future__ import annotations

import ray
from ray.train import ScalingConfig

from af2_ray.config import Cluster


def scaling(cluster: Cluster) -> ScalingConfig:
    """Workers of a job; `gpus: auto` gives each one a GPU where the cluster has enough of them.

    Raises:
        RuntimeError: the cluster as it is now can never hold the workers (it would wait silently for ever).
    """
    have = ray.cluster_resources()
    use_gpu = cluster.gpus == "yes" or (cluster.gpus == "auto" and have.get("GPU", 0) >= cluster.num_workers)
    needed = cluster.num_workers * cluster.cpus_per_worker + cluster.decode_cpus
    if not use_gpu and have.get("CPU", 0) < needed:
        raise RuntimeError(
            f"{cluster.num_workers} workers of {cluster.cpus_per_worker} CPUs and a decode task need {needed:g} CPUs, "
            f"the Ray cluster has {have.get('CPU', 0):g}; lower cluster.num_workers or cluster.cpus_per_worker"
        )
    return ScalingConfig(
        num_workers=cluster.num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": cluster.cpus_per_worker}
    )
