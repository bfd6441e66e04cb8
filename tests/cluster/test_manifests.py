"""The manifests: every overlay rendered, checked strictly against KubeRay and Kubernetes schemas, and beyond them."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from manifests import RAY_KINDS, ROOT, Document, cluster_spec, named, of_kind, other_pods, pods

import af2_ray
from af2_ray.config import load_recipe
from af2_ray.models.from_recipe import recipe_config
from af2_ray.train import costs
from serve_apps import af2

CRD = Path(os.environ.get("AF2_CRD", ROOT.parent / "shared" / "crd"))
MONITORING_KINDS = {"ServiceMonitor", "PodMonitor", "PrometheusRule"}  # no schema at hand; promtool reads the rules


def group(document: Document, name: str) -> Document:
    (found,) = [each for each in cluster_spec(document)["workerGroupSpecs"] if each["groupName"] == name]
    return found


def resources(pod_template: Document) -> Document:
    (container,) = pod_template["spec"]["containers"]
    return container["resources"]["limits"]


def strict(schema: Any) -> Any:
    """The schema with every object closed to fields it does not name."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and not open_ended:
        closed["additionalProperties"] = False
    return closed


_VALIDATORS: dict[str, Draft202012Validator] = {}


def schema_errors(document: Document) -> list[str]:
    """What KubeRay's strict schema holds against a document."""
    kind = document["kind"]
    if kind not in _VALIDATORS:
        file = CRD / f"{kind.lower()}s.v1.json"
        if not file.is_file():
            pytest.skip(f"no KubeRay schema {file}: set AF2_CRD to the folder that has it")
        schema = json.loads(file.read_text())["schema"]
        schema["properties"] |= {"metadata": {"type": "object"}}
        _VALIDATORS[kind] = Draft202012Validator(strict(schema))
    errors = _VALIDATORS[kind].iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def test_every_ray_document_fits_kuberays_schema(rendered: list[Document]) -> None:
    for document in of_kind(rendered, *RAY_KINDS):
        assert schema_errors(document) == [], document["metadata"]["name"]


def test_the_strict_schema_sees_a_mistyped_field(rendered: list[Document]) -> None:
    for kind in RAY_KINDS:
        document = copy.deepcopy(of_kind(rendered, kind)[0])
        cluster_spec(document)["workerGroupSpecs"][0]["minReplica"] = 0
        cluster_spec(document)["headGroupSpec"]["template"]["spec"]["containers"][0]["imag"] = "x"
        assert len(schema_errors(document)) == 2


def test_every_other_document_fits_kubernetes_own_schema(rendered: list[Document]) -> None:
    others = [document for document in rendered if document["kind"] not in RAY_KINDS | MONITORING_KINDS]
    assert {"Deployment", "StatefulSet", "NetworkPolicy", "PodDisruptionBudget"} <= {each["kind"] for each in others}
    for document in others:
        kubernetes_validate.validate(document, "1.32", strict=True)
    mistyped = copy.deepcopy(of_kind(others, "Deployment")[0])
    mistyped["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(mistyped, "1.32", strict=True)


def test_the_operators_own_rules(rendered: list[Document]) -> None:
    locked = (ROOT / "requirements.lock").read_text()
    for document in of_kind(rendered, *RAY_KINDS):
        spec = cluster_spec(document)
        groups = spec["workerGroupSpecs"]
        names = [document["metadata"]["name"], *(each["groupName"] for each in groups)]
        assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", name) for name in names), "DNS-1035"
        assert len(set(names)) == len(names)
        for each in groups:
            assert each["minReplicas"] <= each["replicas"] <= each["maxReplicas"]
            assert each["template"]["spec"]["restartPolicy"] == "Never", "autoscaler v2"
        for each in [spec["headGroupSpec"], *groups]:
            assert all(isinstance(value, str) for value in each["rayStartParams"].values())
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "the head runs no work"
        assert f"ray=={spec['rayVersion']} \\\n" in locked
        assert document["metadata"]["namespace"] == "af2"


def test_standing_clusters_scale_from_zero_and_keep_their_head_s_state(rendered: list[Document]) -> None:
    for document in of_kind(rendered, "RayCluster", "RayService"):
        spec = cluster_spec(document)
        assert spec["enableInTreeAutoscaling"]
        assert spec["autoscalerOptions"]["version"] == "v2"
        address = spec["gcsFaultToleranceOptions"]["redisAddress"]
        redis, _, port = address.removeprefix("redis://").partition(":")
        assert int(port) in [each["port"] for each in named(rendered, "Service", redis)["spec"]["ports"]]
        assert "secretKeyRef" in spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
    (cluster,) = of_kind(rendered, "RayCluster")
    assert group(cluster, "gpu")["replicas"] == group(cluster, "gpu")["minReplicas"] == 0


def test_jobs_retry_end_and_clean_up_under_kueue(rendered: list[Document]) -> None:
    jobs = of_kind(rendered, "RayJob")
    kinds = {document["metadata"]["name"].removeprefix("af2-") for document in jobs}
    assert kinds == {"make-data", "check-data", "train", "evaluate", "sweep"}
    for document in jobs:
        spec = document["spec"]
        assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "af2"
        assert spec["suspend"]  # applying everything starts nothing; Kueue admits
        assert spec["shutdownAfterJobFinishes"], "Kueue, and suspend, want it"
        assert spec["ttlSecondsAfterFinished"] > 0
        assert 0 < spec["activeDeadlineSeconds"] <= 2_592_000
        assert spec["backoffLimit"] >= 0
        assert not cluster_spec(document).get("enableInTreeAutoscaling"), "Kueue admits whole clusters"
        python, script, *_ = shlex.split(spec["entrypoint"])
        assert python == "python"
        assert (ROOT / script).is_file()
        local = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())
        assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"] == local["env_vars"]


def expand(entrypoint: str, settings: dict[str, str]) -> list[str]:
    """The words of an entrypoint as the head's shell sees them."""
    words = re.sub(r"\$(\w+)", lambda match: settings[match[1]], entrypoint)
    return shlex.split(words)


def test_entrypoints_are_what_a_laptop_runs(rendered: list[Document]) -> None:
    settings = named(rendered, "ConfigMap", "af2-settings")["data"]
    _, _, recipe, *overrides = expand(named(rendered, "RayJob", "af2-train")["spec"]["entrypoint"], settings)
    loaded = load_recipe(recipe, overrides)
    assert loaded.storage == settings["AF2_STORAGE"] == "/app/runs"
    assert settings["AF2_MODEL"] == f"/app/runs/{loaded.name}/stages/{loaded.stages[-1].name}/model", "what it exports"
    assert settings["AF2_TEST"] in [dataset.manifest for dataset in loaded.evaluation.manifests]
    service, _, port = settings["MLFLOW_TRACKING_URI"].removeprefix("http://").partition(":")
    assert int(port) in [each["port"] for each in named(rendered, "Service", service)["spec"]["ports"]]


def test_requests_fit_the_recipe(rendered: list[Document]) -> None:
    """Workers of the recipe, one to a GPU or packed on CPUs, and a decode task, within the job's cluster."""
    settings = named(rendered, "ConfigMap", "af2-settings")["data"]
    for name in ("af2-train", "af2-sweep"):
        job = named(rendered, "RayJob", name)
        recipe = load_recipe(settings["AF2_RECIPE"], [f"cluster.gpus={settings['AF2_GPUS']}"])
        workers = recipe.cluster
        cpu, gpu = group(job, "cpu"), group(job, "gpu")
        cpus = cpu["replicas"] * float(resources(cpu["template"])["cpu"])
        if workers.gpus == "yes":
            assert gpu["replicas"] * int(resources(gpu["template"])["nvidia.com/gpu"]) >= workers.num_workers
            assert workers.cpus_per_worker <= float(resources(gpu["template"])["cpu"])
            cpus += gpu["replicas"] * float(resources(gpu["template"])["cpu"])
        needed = workers.num_workers * workers.cpus_per_worker + workers.decode_cpus
        assert needed <= cpus, f"{name}: {needed} CPUs asked, {cpus} there"


def test_the_head_holds_what_a_job_puts_together_on_it(rendered: list[Document]) -> None:
    """The LM, and beside it the whole model that takes it over, in fp32; Ray and the job itself take 2 GiB."""
    settings = named(rendered, "ConfigMap", "af2-settings")["data"]
    counts = costs.parameters(costs.meta_model(recipe_config(load_recipe(settings["AF2_RECIPE"]))))
    needed = 4 * (sum(counts.values()) + counts["lm"]) / 2**30 + 2
    head = cluster_spec(named(rendered, "RayJob", "af2-train"))["headGroupSpec"]["template"]
    assert float(resources(head)["memory"].removesuffix("Gi")) >= needed


def test_a_change_of_model_or_recipe_is_one_of_the_service(rendered: list[Document]) -> None:
    """KubeRay upgrades a service whose own document has changed; a ConfigMap's change it does not see."""
    settings = named(rendered, "ConfigMap", "af2-settings")["data"]
    head = cluster_spec(named(rendered, "RayService", "af2-serve"))["headGroupSpec"]["template"]
    told = {"af2.ray/model": settings["AF2_MODEL"], "af2.ray/recipe": settings["AF2_RECIPE"]}
    assert head["metadata"]["annotations"] == told


def test_disruption_budgets_find_the_server_s_pods(rendered: list[Document]) -> None:
    """By a label of our own: KubeRay puts its name for the service on clusters, not on pods."""
    spec = cluster_spec(named(rendered, "RayService", "af2-serve"))
    kinds = {"head": [spec["headGroupSpec"]], "worker": spec["workerGroupSpecs"]}
    budgets = [named(rendered, "PodDisruptionBudget", name) for name in ("af2-serve", "af2-serve-head")]
    for budget in budgets:
        assert budget["spec"]["minAvailable"] == 1, "without a scale subresource only a number is understood"
        labels = budget["spec"]["selector"]["matchLabels"]
        for pod in kinds[labels.pop("ray.io/node-type")]:
            assert labels.items() <= pod["template"]["metadata"]["labels"].items()
    others = [document for document in of_kind(rendered, *RAY_KINDS) if document["kind"] != "RayService"]
    assert not any("af2.ray/service" in each["metadata"]["labels"] for each in pods(others))


def test_mlflow_keeps_files_on_the_volume_where_they_have_a_path(rendered: list[Document]) -> None:
    artifacts = named(rendered, "ConfigMap", "af2-settings")["data"]["AF2_ARTIFACTS"]
    (container,) = named(rendered, "Deployment", "af2-mlflow")["spec"]["template"]["spec"]["containers"]
    paths = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert artifacts.startswith(("s3://", *(f"{path}/" for path in paths)))


def test_all_ray_pods_share_one_volume_and_one_image(rendered: list[Document]) -> None:
    claim = named(rendered, "PersistentVolumeClaim", "af2-storage")
    images = set()
    for pod in pods(rendered):
        spec = pod["spec"]
        claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "emptyDir" not in v}
        assert claims == {"storage": claim["metadata"]["name"]}
        (container,) = spec["containers"]
        images.add(container["image"])
        paths = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "storage"}
        assert paths == {"/app/data", "/app/runs"}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert spec["serviceAccountName"] == "af2"
    assert len(images) == 1


def test_pods_run_without_rights(rendered: list[Document]) -> None:
    for pod in [*pods(rendered), *other_pods(rendered)]:
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            rights = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert rights.items() <= container["securityContext"].items()
            assert container["resources"]["limits"]


def test_spot_workers_tolerate_and_heads_do_not(rendered: list[Document]) -> None:
    is_spot = [each["key"] for pod in pods(rendered) for each in pod["spec"].get("tolerations", [])].count(
        "af2.ray/spot"
    )
    for document in of_kind(rendered, *RAY_KINDS) if is_spot else []:
        spec = cluster_spec(document)
        assert "tolerations" not in spec["headGroupSpec"]["template"]["spec"]
        for each in spec["workerGroupSpecs"]:
            assert "af2.ray/spot" in [each["key"] for each in each["template"]["spec"]["tolerations"]]
            assert each["template"]["spec"]["nodeSelector"] == {"af2.ray/spot": "true"}


def test_secrets_are_named_never_held(rendered: list[Document]) -> None:
    assert not of_kind(rendered, "Secret")
    text = yaml.safe_dump_all(rendered)
    assert not re.search(r"(?i)secret_?access_?key|AKIA", text)
    for pod in [*pods(rendered), *other_pods(rendered)]:
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            for variable in container.get("env", []):
                if re.search("(?i)password|secret|token", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"], variable


def test_network_policies_open_only_what_is_there(rendered: list[Document]) -> None:
    policies = of_kind(rendered, "NetworkPolicy")
    assert [p["spec"] for p in policies if p["spec"]["podSelector"] == {}] == [
        {"podSelector": {}, "policyTypes": ["Ingress"]}
    ]
    labels = [pod["metadata"]["labels"] for pod in [*pods(rendered), *other_pods(rendered)]]
    for policy in policies:
        wanted = policy["spec"]["podSelector"].get("matchLabels", {}).items()
        assert any(wanted <= each.items() for each in labels), policy["metadata"]["name"]


def test_the_service_is_what_serve_builds(rendered: list[Document], monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve build` calls these two functions; it takes no application with arguments itself."""
    monkeypatch.setattr(af2, "prospect", lambda: None)  # as in a task of the cluster
    from ray.serve._private.build_app import build_app
    from ray.serve.schema import ServeDeploySchema
    from ray.serve.scripts import deployment_to_schema

    (service,) = of_kind(rendered, "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    module, _, name = application.import_path.partition(":")
    settings = named(rendered, "ConfigMap", "af2-settings")["data"]
    arguments = {"model": "s3://bucket/model", "recipe": settings["AF2_RECIPE"], **application.args}
    built = build_app(getattr(importlib.import_module(module), name)(arguments), name=application.name)
    schemas = {each.name: deployment_to_schema(each).model_dump(exclude_unset=True) for each in built.deployments}
    recipe = load_recipe(settings["AF2_RECIPE"], application.args["overrides"].split())
    assert config["http_options"]["request_timeout_s"] >= af2.longest_s(recipe.serve)
    stated = {each["name"]: each for each in config["applications"][0]["deployments"]}
    assert stated.keys() == schemas.keys()
    for deployment, values in stated.items():
        for key, value in values.items():
            found = schemas[deployment][key]
            assert (found if not isinstance(value, dict) else {k: found[k] for k in value}) == value, (deployment, key)


def test_the_service_s_pods_hold_its_replicas(rendered: list[Document]) -> None:
    (service,) = of_kind(rendered, "RayService")
    deployments = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["deployments"]
    model = next(each for each in deployments if each["name"] == "Model")
    options, most = model["ray_actor_options"], model["autoscaling_config"]["max_replicas"]
    where = group(service, "gpu" if options["num_gpus"] else "cpu")
    assert most <= where["maxReplicas"]
    assert options["num_cpus"] <= float(resources(where["template"])["cpu"])
    assert options["num_gpus"] <= int(resources(where["template"]).get("nvidia.com/gpu", 0))
    assert service["spec"]["upgradeStrategy"]["type"] == "NewCluster"
    assert service["spec"]["rayClusterDeletionDelaySeconds"] >= 120, "the recipe's request_timeout_s"


def test_the_image_has_what_the_pods_need() -> None:
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    for line in re.findall(r"^COPY ((?!--from).+)$", dockerfile, re.MULTILINE):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources), line
    assert "pip install --require-hashes -r requirements.lock" in dockerfile
    assert "requirements-dev" not in dockerfile, "no test tools in the image"
    stages = re.split(r"^FROM ", dockerfile, flags=re.MULTILINE)[1:]
    assert [stage.split()[0] for stage in stages] == [
        *("${PYTHON_IMAGE}", "${PYTHON_IMAGE}", "base", "base", "${VARIANT}")
    ]
    assert "g++" not in dockerfile, "no compiler"
    assert "USER 1000" in stages[1]


def test_images_are_named_by_the_version() -> None:
    for path in (ROOT / "cluster").rglob("settings.yaml"):
        tags = re.findall(r"af2-ray:([\w.]+)", path.read_text())
        assert set(tags) <= {af2_ray.__version__}, path


def test_runtime_env_carries_code_only(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import _get_excludes

    runtime_env = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())
    assert set(runtime_env) == {"working_dir", "excludes", "env_vars"}
    excluded = _get_excludes(tmp_path, runtime_env["excludes"])
    kept = ("af2_ray/data/feed.py", "af2_ray/recipes/tiny.yaml", "jobs/train.py", "serve_apps/af2.py", "pyproject.toml")
    dropped = ("data/demo/short/train.json", "runs/tiny/recipe.yaml", ".venv/bin/python", ".git/HEAD", "runs/mlflow.db")
    for path in kept + dropped:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    parents = {path: [tmp_path / path, *list((tmp_path / path).parents)[: path.count("/")]] for path in kept + dropped}
    assert not [path for path in kept if any(excluded(step) for step in parents[path])]
    assert not [path for path in dropped if not any(excluded(step) for step in parents[path])]
