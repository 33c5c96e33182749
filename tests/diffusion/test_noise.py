"""Correlated noise: unit normal in each frame, with the correlation of its family."""

import pytest
import torch

from ldm.diffusion.noise import NoiseFamily
from ldm.errors import UserError

pytestmark = pytest.mark.numeric

FRAMES = 6


def many(family: NoiseFamily, size: int = 256) -> torch.Tensor:
    """Frames of one large clip, flattened, `t n` with n = 4 * 256 * 256."""
    return family.draw(FRAMES, 4, size, size, torch.Generator().manual_seed(0)).flatten(1)


@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("kind", ["mixed", "progressive"])
def test_frames_correlate_by_the_share(kind, share):
    """Within 0.01: the standard error over 262,144 numbers is 0.002."""
    correlation = torch.corrcoef(many(NoiseFamily(kind, share)))
    apart = (torch.arange(FRAMES)[:, None] - torch.arange(FRAMES)).abs()
    expected = torch.where(apart == 0, 1.0, share) if kind == "mixed" else share ** apart.float()
    assert (correlation - expected).abs().max() < 0.01


@pytest.mark.parametrize("family", [NoiseFamily(), NoiseFamily("mixed", 0.5), NoiseFamily("progressive", 0.9)])
def test_each_frame_is_unit_normal(family):
    noise = many(family)
    assert (noise.mean(dim=1).abs() < 0.01).all() and (noise.std(dim=1) - 1).abs().max() < 0.01
    assert ((noise.abs() < 1.96).float().mean(dim=1) - 0.95).abs().max() < 0.005


def test_independent_frames_do_not_correlate():
    correlation = torch.corrcoef(many(NoiseFamily()))
    assert (correlation - torch.eye(FRAMES)).abs().max() < 0.01


def test_an_offset_shifts_each_channel_of_a_clip():
    generator = torch.Generator().manual_seed(1)
    means = torch.stack([NoiseFamily(offset=0.3).draw(3, 4, 64, 64, generator).mean(dim=(2, 3)) for _ in range(500)])
    assert torch.allclose(means.std(dim=0), torch.full((3, 4), 0.3), atol=0.03)
    assert torch.corrcoef(means[:, :, 0].T).min() > 0.98  # the frames of a clip move together
    assert torch.corrcoef(means[:, 0].T).fill_diagonal_(0).abs().max() < 0.2  # its channels do not


@pytest.mark.parametrize("family", [NoiseFamily(), NoiseFamily("mixed", 0.5, 0.1), NoiseFamily("progressive", 0.5)])
def test_a_longer_clip_starts_with_the_noise_of_the_shorter(family):
    short, long = (family.draw(frames, 4, 8, 8, torch.Generator().manual_seed(5)) for frames in (3, 7))
    assert torch.equal(long[:3], short)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pink"}, "noise.kind: expected one of independent, mixed, progressive, found 'pink'"),
        ({"kind": "mixed", "share": 1.0}, "noise.share: expected a correlation from 0 to below 1, found 1.0"),
        ({"kind": "mixed"}, "expected a share above 0 for mixed"),
        ({"share": 0.5}, "none for independent, found share 0.5 with kind independent"),
        ({"offset": -1}, "noise.offset: expected a standard deviation from 0 to 1"),
        ({"amount": 0.5}, "model.params.noise: expected the keys kind, share, offset, found 'amount'"),
        ("mixed", "model.params.noise: expected the keys kind, share, offset, found 'mixed'"),
    ],
)
def test_impossible_families_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        NoiseFamily.from_config(options)


def test_independent_frames_are_the_default():
    family = NoiseFamily.from_config(None)
    assert (family.kind, family.share, family.offset) == ("independent", 0.0, 0.0)
