"""What of a training clip is known: each kind as its name says, in the shares that were set."""

import pytest
import torch

from ldm.diffusion.known_frames import KINDS, KnownFrameMixture
from ldm.errors import UserError


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


def test_each_kind_knows_the_frames_its_name_says():
    assert known_sets("nothing") == {()}
    assert known_sets("first") == {(0,)}
    assert known_sets("ends") == {(0, 6)}
    assert known_sets("every") == {(0, 2, 4, 6), (0, 3, 6), (0, 4), (0, 5), (0, 6)}
    assert known_sets("previous") == {tuple(range(k)) for k in range(1, 7)}
    sizes = {len(known) for known in known_sets("random")}
    assert sizes == set(range(1, 7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_something_is_always_left_to_be_made(kind, frames):
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


def test_kinds_come_in_the_shares_that_were_set():
    mixture = KnownFrameMixture({"nothing": 1, "first": 3, "ends": 0})
    firsts = sum(bool(mask[0, 0, 0, 0] == 0) for mask, _ in draws(mixture, num=2000))
    assert abs(firsts / 2000 - 0.75) < 0.03


def test_half_of_the_clips_get_noise_up_to_the_greatest_step():
    levels = torch.tensor([level for _, level in draws(KnownFrameMixture({"first": 1}, max_noise=200), num=2000)])
    assert abs((levels == 0).float().mean() - 0.5) < 0.04
    noisy = levels[levels > 0]
    assert noisy.min() >= 1 and noisy.max() <= 200 and abs(noisy.float().mean() - 100) < 8
    assert all(level == 0 for _, level in draws(KnownFrameMixture({"first": 1})))


@pytest.mark.parametrize(
    ("words", "message"),
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
def test_impossible_mixtures_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        KnownFrameMixture.from_config(words)
