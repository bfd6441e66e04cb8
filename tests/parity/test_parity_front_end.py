"""Windows, mel and patch embedding against the reference's, to the bit where it is integers."""

import pytest
import torch
from golden import case, facts, load, needs_golden, sha256, windows

from af2_ray.audio.mel import LogMel

pytestmark = needs_golden


def test_windows_are_equal_to_the_bit() -> None:
    expected = facts()["front_end"]
    for clip, hashes, count in zip(windows(), expected["windows_int16_sha256"], expected["real_windows"], strict=True):
        assert len(clip) == count
        assert [sha256(window) for window in clip] == hashes[:count]


def test_mel() -> None:
    common = load("common")
    first, second = (LogMel()(clip) for clip in windows())
    expected = {"mel.0.0_head": first[0], "mel.1.0": second[0], "mel.1.last_head": second[-1]}
    for name, mel in expected.items():
        torch.testing.assert_close(mel[: len(common[name])], common[name], atol=1e-4, rtol=0)
    assert (LogMel()(torch.zeros(1, 160_000, dtype=torch.int16)) == -100).all()


@pytest.mark.parametrize("longer", [True, False])
@torch.no_grad()
def test_patch_embedding_with_and_without_fusion(longer: bool) -> None:
    embed = case("n1").model.audio_tower.model.audio_encoder.patch_embed
    i = torch.arange(4 * 256 * 256)
    image = (((i * 7919 + (i // 256) * 104729) % 2001).double() / 1000 - 1).float().view(1, 4, 256, 256)
    patches = embed(image, torch.tensor([0] if longer else [], dtype=torch.long))[:, ::16]
    torch.testing.assert_close(patches, load("common")["aff.longer" if longer else "aff.not_longer"], atol=1e-4, rtol=0)
