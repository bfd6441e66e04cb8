"""Scenes composed as a corpus composes them, without their sound."""

from __future__ import annotations

from af2_ray.config import SceneSet
from af2_ray.synth import corpus as corpus_module
from af2_ray.synth.facts import Facts
from af2_ray.synth.scenes import Scene, compose_block, facts_of
from af2_ray.synth.sounds.bank import Bank


def blocks(scenes: SceneSet, bank: Bank) -> list[list[Scene]]:
    return [compose_block(scenes, bank, index, seed=0) for index in range(scenes.num_scenes // corpus_module.BLOCK)]


def facts(block: list[Scene]) -> list[Facts]:
    return [facts_of(scene) for scene in block]


def pool_of(block: list[Scene], bank: Bank) -> list[str]:
    return [label for label in bank.labels if not (block[0].bed_kind == "music" and bank.musical[label])]
