"""The source clips that a corpus renders where there are no packages."""

from __future__ import annotations

import pytest

from af2_ray.config import Corpus, SceneSet
from af2_ray.synth.corpus import make_corpus
from af2_ray.synth.sounds.bank import Bank


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("bank")
    tiny = SceneSet(name="x", split="train", num_scenes=4, duration_s=(5, 6), num_events=(1, 1))
    make_corpus(Corpus(dir=str(folder), sources="rendered", sets=[tiny]), num_processes=1)
    return Bank(folder / "sources")
