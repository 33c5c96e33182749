"""Masks of known frames: what each kind draws and how often; unknown latents filled from known ones."""

import pytest
import torch

from ldm.diffusion.known_frames import KINDS, KnownFrameMixture, fill_unknown
from ldm.errors import UserError

pytestmark = pytest.mark.numeric


def draws(mixture: KnownFrameMixture, num: int = 300, frames: int = 7, h: int = 8, w: int = 12):
    generator = torch.Generator()
    return [mixture.draw(frames, h, w, generator.manual_seed(seed)) for seed in range(num)]


def known_sets(kind: str, frames: int = 7) -> set[tuple[int, ...]]:
    """The sets of known frames that a kind draws."""
    masks = [mask for mask, _ in draws(KnownFrameMixture({kind: 1}), frames=frames)]
    for mask in masks:
        assert mask.shape == (frames, 1, 8, 12)
        assert (mask.amin(dim=(1, 2, 3)) == mask.amax(dim=(1, 2, 3))).all()  # whole frames
    return {tuple((mask[:, 0, 0, 0] == 0).nonzero().flatten().tolist()) for mask in masks}


def test_known_frames_of_each_kind():
    assert known_sets("nothing") == {()}
    assert known_sets("first") == {(0,)}
    assert known_sets("ends") == {(0, 6)}
    assert known_sets("every") == {(0, 2, 4, 6), (0, 3, 6), (0, 4), (0, 5), (0, 6)}
    assert known_sets("previous") == {tuple(range(k)) for k in range(1, 7)}
    sizes = {len(known) for known in known_sets("random")}
    assert sizes == set(range(1, 7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_something_is_always_unknown(kind, frames):
    for mask, _ in draws(KnownFrameMixture({kind: 1}), num=50, frames=frames):
        assert mask.sum() > 0
        if kind != "nothing" and (frames > 1 or kind == "pixels"):
            assert (1 - mask).sum() > 0


def test_pixels_are_a_rectangle_or_all_but_one_in_every_frame():
    fractions = []
    for mask, _ in draws(KnownFrameMixture({"pixels": 1})):
        assert torch.equal(mask, mask[:1].expand_as(mask))
        inside = mask[0, 0] if mask[0, 0].sum() <= 48 else 1 - mask[0, 0]
        for part in (mask[0, 0], 1 - mask[0, 0]):
            rows, columns = part.amax(1).nonzero().flatten(), part.amax(0).nonzero().flatten()
            box = part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            if box.min() == 1:
                break
        else:
            raise AssertionError("neither the known nor the unknown part is a rectangle")
        fractions.append(mask.mean().item())
        assert inside.sum() > 0
    assert min(fractions) < 0.2 and max(fractions) > 0.8


def test_kinds_occur_by_their_weights():
    mixture = KnownFrameMixture({"nothing": 1, "first": 3, "ends": 0})
    firsts = sum(bool(mask[0, 0, 0, 0] == 0) for mask, _ in draws(mixture, num=2000))
    assert abs(firsts / 2000 - 0.75) < 0.03


def test_half_of_the_clips_get_noise_up_to_max_noise():
    levels = torch.tensor([level for _, level in draws(KnownFrameMixture({"first": 1}, max_noise=200), num=2000)])
    assert abs((levels == 0).float().mean() - 0.5) < 0.04
    noisy = levels[levels > 0]
    assert noisy.min() >= 1 and noisy.max() <= 200 and abs(noisy.float().mean() - 100) < 8
    assert all(level == 0 for _, level in draws(KnownFrameMixture({"first": 1})))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture": {"last": 1}}, "known_frames.mixture.last: expected one of nothing, first, ends"),
        ({"mixture": {"first": -1}}, "mixture.first: expected a weight from 0, found -1"),
        ({"mixture": {"first": 0}}, "expected at least one kind with a weight above 0, found none"),
        ({"mixture": {}}, "expected at least one kind"),
        ({"mixture": {"first": 1}, "max_noise": -5}, "max_noise: expected a diffusion step from 0, found -5"),
        ({"mixture": {"first": 1}, "noise": 5}, "expected the keys mixture, max_noise and fill"),
        ({"max_noise": 5}, "expected the keys mixture, max_noise and fill"),
        ({"mixture": {"first": 1}, "fill": "noise"}, "fill: expected one of blend, zeros, found 'noise'"),
    ],
)
def test_impossible_mixtures_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        KnownFrameMixture.from_config(options)


def frames(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1, 1)


def fill(values, unknown) -> list[float]:
    return fill_unknown(frames(*values), frames(*unknown)).flatten().tolist()


def test_between_known_frames_is_their_linear_blend():
    assert fill([2, 99, 99, 99, 10], [0, 1, 1, 1, 0]) == [2, 4, 6, 8, 10]
    assert fill([0, 99, 3, 99, 99, 9], [0, 1, 0, 1, 1, 0]) == [0, 1.5, 3, 5, 7, 9]


def test_beyond_known_frames_is_the_nearest():
    assert fill([99, 99, 5, 7, 99], [1, 1, 0, 0, 1]) == [5, 5, 5, 7, 7]


def test_unknown_everywhere_is_zero():
    assert fill([1, 2, 3], [1, 1, 1]) == [0, 0, 0]
    images = torch.randn(2, 4, 3, 3)
    mask = torch.zeros(2, 1, 3, 3)
    mask[:, :, 1] = 1
    assert torch.equal(fill_unknown(images, mask), images * (1 - mask))


def test_each_pixel_is_filled_from_its_own_frames():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 6, 4, 5, 3, generator=generator)
    mask = (torch.rand(2, 6, 1, 5, 3, generator=generator) < 0.6).float()
    whole = fill_unknown(latents, mask)
    for b, y, x in ((0, 0, 0), (1, 4, 2), (0, 2, 1), (1, 3, 0)):
        alone = fill_unknown(
            latents[b : b + 1, :, :, y : y + 1, x : x + 1], mask[b : b + 1, :, :, y : y + 1, x : x + 1]
        )
        assert torch.equal(alone[0, :, :, 0, 0], whole[b, :, :, y, x])
    is_known = (mask == 0).expand_as(latents)
    assert torch.equal(whole[is_known], latents[is_known])  # bit for bit
    changed = torch.where(is_known, latents, 99)
    assert torch.equal(fill_unknown(changed, mask), whole)
