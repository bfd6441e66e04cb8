"""Scenes composed as a corpus composes them, without their sound."""

from __future__ import annotations

from af2_ray.config import SceneSet
from af2_ray.synth.corpus import BLOCK
from af2_ray.synth.scenes import Scene, compose_block
from af2_ray.synth.sounds.bank import Bank


def blocks(scenes: SceneSet, bank: Bank) -> list[list[Scene]]:
    return [compose_block(scenes, bank, index, seed=0) for index in range(scenes.num_scenes // BLOCK)]
