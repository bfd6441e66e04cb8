"""What tests of the manifests find in rendered documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ("dev", "prod", "spot")
RAY_KINDS = {"RayCluster", "RayJob", "RayService"}

Document = dict[str, Any]


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def named(documents: list[Document], kind: str, name: str) -> Document:
    (found,) = [document for document in of_kind(documents, kind) if document["metadata"]["name"] == name]
    return found


def cluster_spec(document: Document) -> Document:
    """The RayCluster's specification inside any of the three kinds."""
    spec = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(documents: list[Document]) -> Iterator[Document]:
    """Every pod template of the Ray kinds."""
    for document in of_kind(documents, *RAY_KINDS):
        spec = cluster_spec(document)
        for each in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            yield each["template"]


def other_pods(documents: list[Document]) -> Iterator[Document]:
    for document in of_kind(documents, "Deployment", "StatefulSet"):
        yield document["spec"]["template"]
