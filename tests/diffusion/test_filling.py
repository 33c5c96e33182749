"""What stands for latents that are not known: the blend of those before and after, place by place."""

import torch

from ldm.diffusion.known_frames import fill_unknown


def frames(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1, 1)


def fill(values, unknown) -> list[float]:
    return fill_unknown(frames(*values), frames(*unknown)).flatten().tolist()


def test_between_two_known_frames_lies_their_blend():
    assert fill([2, 99, 99, 99, 10], [0, 1, 1, 1, 0]) == [2, 4, 6, 8, 10]
    assert fill([0, 99, 3, 99, 99, 9], [0, 1, 0, 1, 1, 0]) == [0, 1.5, 3, 5, 7, 9]


def test_beyond_the_known_frames_stays_the_nearest():
    assert fill([99, 99, 5, 7, 99], [1, 1, 0, 0, 1]) == [5, 5, 5, 7, 7]


def test_where_nothing_is_known_is_nothing():
    assert fill([1, 2, 3], [1, 1, 1]) == [0, 0, 0]
    images = torch.randn(2, 4, 3, 3)
    mask = torch.zeros(2, 1, 3, 3)
    mask[:, :, 1] = 1
    assert torch.equal(fill_unknown(images, mask), images * (1 - mask))


def test_every_place_is_filled_from_its_own_frames():
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
