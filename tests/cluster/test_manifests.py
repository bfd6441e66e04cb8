"""The manifests: rendered, checked against KubeRay's schemas made strict, and against what the schemas do not say."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from af2_ray.config import load_recipe

ROOT = Path(__file__).resolve().parents[2]
CRD = Path(os.environ.get("AF2_CRD", ROOT.parent / "shared" / "crd"))
KINDS = ("RayCluster", "RayJob", "RayService")


@pytest.fixture(scope="module")
def rendered() -> dict[str, Any]:
    """Documents of the base, by kind."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: it renders the manifests (`kubectl kustomize`)")
    command = ["kubectl", "kustomize", str(ROOT / "cluster" / "base")]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    documents = {document["kind"]: document for document in yaml.safe_load_all(text)}
    assert set(documents) == {"ConfigMap", "PersistentVolumeClaim", *KINDS}
    return documents


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    """The RayCluster's specification inside any of the three kinds."""
    spec = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


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


def schema_errors(document: dict[str, Any]) -> list[str]:
    """What KubeRay's strict schema holds against a document."""
    file = CRD / f"{document['kind'].lower()}s.v1.json"
    if not file.is_file():
        pytest.skip(f"no KubeRay schema {file}: set AF2_CRD to the folder that has it")
    schema = json.loads(file.read_text())["schema"]
    schema["properties"] |= {"metadata": {"type": "object"}}
    errors = Draft202012Validator(strict(schema)).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


@pytest.mark.parametrize("kind", KINDS)
def test_fits_kuberays_schema(rendered: dict[str, Any], kind: str) -> None:
    assert schema_errors(rendered[kind]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_strict_schema_sees_a_mistyped_field(rendered: dict[str, Any], kind: str) -> None:
    document = copy.deepcopy(rendered[kind])
    cluster_spec(document)["workerGroupSpecs"][0]["minReplica"] = 0
    cluster_spec(document)["headGroupSpec"]["template"]["spec"]["containers"][0]["imag"] = "x"
    assert len(schema_errors(document)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_operators_own_rules(rendered: dict[str, Any], kind: str) -> None:
    document = rendered[kind]
    spec = cluster_spec(document)
    groups = spec["workerGroupSpecs"]
    names = [document["metadata"]["name"], *(group["groupName"] for group in groups)]
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", name) for name in names), "DNS-1035"
    assert len(set(names)) == len(names)
    for group in groups:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["template"]["spec"]["restartPolicy"] == "Never", "autoscaler v2"
    for group in [spec["headGroupSpec"], *groups]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert f"ray=={spec['rayVersion']}\n" in (ROOT / "requirements.lock").read_text()


def pods(documents: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every pod of the three kinds."""
    for kind in KINDS:
        spec = cluster_spec(documents[kind])
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            yield group["template"]["spec"]


def containers(documents: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every container of every pod."""
    for pod in pods(documents):
        yield from pod["containers"]


def test_all_pods_share_one_volume(rendered: dict[str, Any]) -> None:
    claim = rendered["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(rendered):
        claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "emptyDir" not in v}
        assert claims == {"storage": claim["metadata"]["name"]}
        assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000}
        (container,) = pod["containers"]
        paths = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "storage"}
        assert paths == {"/app/data", "/app/runs"}
        assert "WORKDIR /app\n" in (ROOT / "cluster" / "Dockerfile").read_text()


def test_one_place_sets_image_and_settings(rendered: dict[str, Any]) -> None:
    (image,) = yaml.safe_load((ROOT / "cluster/base/kustomization.yaml").read_text())["images"]
    settings = rendered["ConfigMap"]["metadata"]["name"]
    for container in containers(rendered):
        assert container["image"] == f"{image['newName']}:{image['newTag']}"
        assert container["envFrom"][0]["configMapRef"]["name"] == settings
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_secrets_are_named_never_held(rendered: dict[str, Any]) -> None:
    assert all("env" not in container for container in containers(rendered))
    text = yaml.safe_dump_all(rendered.values())
    assert not re.search(r"(?i)secret_?access_?key|password|AKIA", text)


def test_training_runs_the_script_that_a_laptop_runs(rendered: dict[str, Any]) -> None:
    settings = rendered["ConfigMap"]["data"]
    job = rendered["RayJob"]["spec"]
    python, script, recipe, *overrides = shlex.split(job["entrypoint"])
    assert (python, script) == ("python", "jobs/train.py")
    assert (ROOT / script).is_file()
    assert recipe == settings["AF2_RECIPE"]
    loaded = load_recipe(recipe, overrides)
    assert loaded.storage == settings["AF2_STORAGE"] == "/app/runs"
    assert settings["AF2_MODEL"] == f"/app/runs/{loaded.name}/stages/{loaded.stages[-1].name}/model", "what it exports"
    local = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())
    assert yaml.safe_load(job["runtimeEnvYAML"])["env_vars"] == local["env_vars"]


def test_the_service_serves_our_app(rendered: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve_apps.af2 import AppArgs

    service = rendered["RayService"]
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"])).applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    args = AppArgs.model_validate(application.args)
    settings = load_recipe(rendered["ConfigMap"]["data"]["AF2_RECIPE"], args.overrides.split()).serve
    assert settings.min_replicas <= settings.max_replicas
    gpu_group = next(group for group in cluster_spec(service)["workerGroupSpecs"] if group["groupName"] == "gpu")
    (container,) = gpu_group["template"]["spec"]["containers"]
    assert settings.gpus_per_replica == int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert settings.cpus_per_replica <= int(container["resources"]["limits"]["cpu"])
    assert settings.max_replicas <= gpu_group["maxReplicas"]


def test_the_image_has_what_the_pods_need() -> None:
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources), line
    assert "-r requirements.lock" in dockerfile
    assert re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE) == [
        "python:3.11-slim-bookworm",
        "base",
        "base",
        "${VARIANT}",
    ]


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
