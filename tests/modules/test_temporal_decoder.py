"""Temporal layers of the decoder: the identity at first, the same in chunks, and after training frames agree.

In float64, so bounds do not depend on the kernels of a CPU.
"""

from __future__ import annotations

import copy

import pytest
import torch

from ldm.errors import UserError
from ldm.modules.encoders import KLFirstStage
from ldm.modules.temporal_decoder import BRIGHTNESS, FramesBlock, TemporalDecoder
from tests.conftest import draw

pytestmark = pytest.mark.numeric
DDCONFIG = {"z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 1}


@pytest.fixture(scope="module")
def first_stage() -> KLFirstStage:
    torch.manual_seed(0)
    return KLFirstStage(DDCONFIG, 4).requires_grad_(False).double().eval()


def make_decoder(blocks=(2, 1, 1), fresh: bool = False, **options) -> TemporalDecoder:
    torch.manual_seed(1)
    decoder = TemporalDecoder(DDCONFIG["ch"], DDCONFIG["ch_mult"], list(blocks), **options)
    for module in decoder.modules():
        if isinstance(module, FramesBlock) and not fresh:
            torch.nn.init.normal_(module.put.weight, std=0.1)
    return decoder.double()


def latents_of(num_clips: int, num_frames: int) -> torch.Tensor:
    return draw(num_clips, num_frames, 4, 4, 6, seed=2).double()


def test_parts_in_turn_are_the_image_decoder(first_stage):
    x = latents_of(1, 3)[0]
    expected = first_stage.decode(x)
    for part in first_stage.decoder_parts():
        x = part(x)
    assert torch.equal(x, expected)


def test_no_part_is_given_more_frames_than_a_chunk_and_state_holds_two_frames(first_stage):
    decoder, most = make_decoder(), []

    def watched(part):
        return lambda x: most.append(len(x)) or part(x)

    list(decoder.decode([watched(part) for part in first_stage.decoder_parts()], latents_of(1, 11)[0].split(2)))
    assert max(most) == 2
    block = decoder.places[0][0]
    _, held = block(draw(1, 8, 64, 4, 6).double(), None, False)
    assert [tensor.untyped_storage().nbytes() // tensor[0, 0].nbytes for tensor in held] == [1, 2]


def test_untrained_layers_decode_frame_by_frame(first_stage):
    latents = latents_of(2, 5)
    frames = make_decoder(fresh=True)(first_stage.decoder_parts(), latents)
    alone = first_stage.decode(latents.flatten(0, 1)).unflatten(0, (2, 5))
    assert frames.shape == (2, 5, 3, 16, 24) and torch.equal(frames, alone)


def test_a_frame_depends_on_as_many_neighbours_as_there_are_blocks(first_stage):
    decoder, latents = make_decoder(), latents_of(1, 12)
    before = decoder(first_stage.decoder_parts(), latents)
    latents[0, 5] += 1
    moved = (decoder(first_stage.decoder_parts(), latents) - before).abs().amax((0, 2, 3, 4)) > 1e-12
    assert moved.nonzero().flatten().tolist() == list(range(1, 10))  # four blocks


@pytest.mark.parametrize("area", [0, 2])
@pytest.mark.parametrize("chunk", [1, 2, 5, 20])
def test_chunks_give_the_frames_of_the_whole(first_stage, chunk, area):
    decoder, latents, parts = make_decoder(brightness_area=area), latents_of(1, 11), first_stage.decoder_parts()
    whole = decoder(parts, latents)[0]
    assert (whole - first_stage.decode(latents[0])).abs().max() > 0.01
    pieces = list(decoder.decode(parts, latents[0].split(chunk)))
    assert all(len(piece) <= chunk for piece in pieces)
    assert torch.cat(pieces).shape == whole.shape and (torch.cat(pieces) - whole).abs().max() < 1e-12


@pytest.mark.parametrize("area", [1, 2, 3])
def test_only_the_brightness_of_details_comes_from_temporal_layers(first_stage, area):
    latents, parts = latents_of(1, 5), first_stage.decoder_parts()
    alone = first_stage.decode(latents[0])
    off = {size: make_decoder(brightness_area=size)(parts, latents)[0] - alone for size in (0, area, 100)}
    by_channel = {size: change.std(dim=1).mean() for size, change in off.items()}
    assert by_channel[area] < 1e-5 and by_channel[0] > 0.01  # what is added is grey, so that red stays red
    side = 4 * area  # a latent is four pixels
    in_areas = {size: torch.nn.functional.avg_pool2d(change, side).abs().mean() for size, change in off.items()}
    assert in_areas[area] < 0.6 * in_areas[100]  # on the whole an area is as bright as the image decoder has it
    assert off[area].abs().mean() > 0.01  # details do differ
    assert off[100].mean((2, 3)).abs().max() < 1e-5
    on_the_whole = {size: change.mean((2, 3)).abs().max() for size, change in off.items()}
    assert on_the_whole[area] < 0.2 * on_the_whole[0]


def details(frames: torch.Tensor) -> torch.Tensor:
    """The part of frames `b t 3 h w` that temporal layers decide beside the image decoder."""
    grey = (frames * torch.tensor(BRIGHTNESS).view(3, 1, 1)).sum(2)
    means = torch.nn.functional.avg_pool2d(grey, 8)  # two latents
    return grey - torch.nn.functional.interpolate(means, size=grey.shape[-2:], mode="bilinear")


@pytest.mark.slow
@pytest.mark.parametrize("area", [0, 2])
def test_training_makes_frames_agree(first_stage, area):
    """Frames that differ by noise on their latents: decoded together, they differ less."""
    decoder, first_stage = make_decoder(fresh=True, brightness_area=area).float(), copy.deepcopy(first_stage).float()
    parts, generator = first_stage.decoder_parts(), torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)

    def noisy() -> tuple[torch.Tensor, torch.Tensor]:
        still = torch.randn(2, 1, 4, 4, 6, generator=generator)
        noise = 0.5 * torch.randn(2, 5, 4, 4, 6, generator=generator)
        return still + noise, first_stage.decode(still[:, 0])[:, None]

    for _ in range(100):
        latents, target = noisy()
        optimizer.zero_grad()
        frames = decoder(parts, latents.requires_grad_())
        ((frames - target).square().mean() + 0.2 * frames.diff(dim=1).square().mean()).backward()
        optimizer.step()
    latents, target = noisy()
    alone = first_stage.decode(latents.flatten(0, 1)).unflatten(0, (2, 5))
    with torch.no_grad():
        frames = decoder(parts, latents)
    if area:
        frames, target, alone = details(frames), details(target), details(alone)
    assert (frames - target).square().mean() < 0.9 * (alone - target).square().mean()
    assert frames.diff(dim=1).square().mean() < 0.6 * alone.diff(dim=1).square().mean()


@pytest.mark.parametrize("blocks", [[], [0, 0], [1, 1, 1, 1], [1.5], [-1], "two"])
def test_impossible_numbers_of_blocks_are_refused(blocks):
    with pytest.raises(UserError, match=r"blocks: expected up to 3 whole numbers, .* not all 0"):
        TemporalDecoder(32, [1, 1, 2], blocks)


@pytest.mark.parametrize("area", [-1, True, 1.5])
def test_impossible_sizes_are_refused(area):
    with pytest.raises(UserError, match=f"brightness_area: expected a whole number of latents, found {area}"):
        make_decoder(brightness_area=area)
    with pytest.raises(UserError, match=r"ch: expected a multiple of 32, .* found 30"):
        TemporalDecoder(30, [1, 1, 2], [1])
