"""Checkpointing, a feed-forward in chunks and inputs in host memory: the same numbers with less memory.

Runs are compared with each other on the same machine, to the bit.
"""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from ldm.config import ConfigError, check, load_config
from ldm.errors import UserError
from ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from ldm.modules.recompute import HostMemory, in_chunks
from ldm.modules.unet import Downsample, ResBlock, UNetModel, Upsample
from ldm.optim.parameter_groups import ParameterGroups
from ldm.planning.count import StepShape, count_step

pytestmark = pytest.mark.numeric
SMALL = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 2,
    "context_dim": 16,
}
STEPS = 20
NUM_BLOCKS = 14
NUM_TRANSFORMERS, NUM_FRAMES = 4, 12  # where bytes are counted
REFERENCE = {"temporal": True, "time_embed": True, "convolutions": True}
EVERYTHING = REFERENCE | {"spatial_attention": True}
HALF = torch.bfloat16
SWITCHES = [
    {"use_checkpoint": True},
    {"use_checkpoint": 5},
    {"use_checkpoint": True, "inputs_on_host": True},
    {"feed_forward_frames": 1},
    {"feed_forward_frames": 2, "use_checkpoint": 9, "inputs_on_host": True},
]


def small_unet(trained: dict[str, bool] = REFERENCE, device: str = "cpu", **options) -> UNetModel:
    torch.manual_seed(0)
    unet = UNetModel(**SMALL | options)
    generator = torch.Generator().manual_seed(0)
    for weight in unet.parameters():  # away from the zeros of the initialisation, where some gradients are 0
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    ParameterGroups(unet, trained).freeze_the_rest()
    return unet.to(device)


def steps(unet: UNetModel, num: int, precision: torch.dtype | None = None, adam: bool = True) -> list[torch.Tensor]:
    """Losses of `num` steps of AdamW or SGD on random clips of 3 frames, then the weights."""
    device = next(unet.parameters()).device
    kind, rate = (torch.optim.AdamW, 1e-3) if adam else (torch.optim.SGD, 0.03)
    optimizer = kind([weight for weight in unet.parameters() if weight.requires_grad], lr=rate, fused=True)
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(num):
        x, target = torch.randn(2, 1, 3, 4, 8, 8, generator=generator).to(device)
        context = torch.randn(1, 7, 16, generator=generator).to(device)
        with torch.autocast(device.type, precision, enabled=precision is not None):
            out = unet(x, torch.tensor([400]).to(device), context)
        loss = (out.float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.detach())
    return [*found, *(weight.detach() for weight in unet.parameters())]


def are_close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> bool:
    return all(
        torch.equal(one, other) or (tolerance and (one - other).norm() <= tolerance * other.norm())
        for one, other in zip(found, expected, strict=True)
    )


@pytest.fixture(scope="module")
def plain() -> dict[torch.dtype | None, list[torch.Tensor]]:
    return {precision: steps(small_unet(), STEPS, precision) for precision in (None, HALF)}


def rows_have_the_same_bits() -> bool:
    """Whether a bfloat16 product has the same bits for a row whatever the number of rows; not on CPUs with AMX."""
    return not torch.cpu._is_amx_tile_supported()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "precision"), [*((options, None) for options in SWITCHES), (SWITCHES[4], HALF)], ids=str
)
def test_steps_are_those_of_the_plain_run(plain, options, precision):
    found = steps(small_unet(**options), STEPS, precision)
    if precision is HALF and not rows_have_the_same_bits():
        assert are_close(found[:STEPS], plain[HALF][:STEPS], 1e-2)  # the losses
        options = {key: value for key, value in options.items() if key != "feed_forward_frames"}
        found = steps(small_unet(**options), STEPS, precision)
    assert are_close(found, plain[precision], 0)


def test_steps_with_everything_trained():
    """Gradients of weights are sums in another order; SGD, as Adam amplifies gradients that are 0 but for rounding."""
    start = steps(small_unet(EVERYTHING), 0)
    expected = steps(small_unet(EVERYTHING), STEPS, adam=False)
    found = steps(small_unet(EVERYTHING, feed_forward_frames=2, use_checkpoint=True), STEPS, adam=False)
    assert are_close(found, expected, 1e-6)
    assert not are_close(start, expected[STEPS:], 1e-3)


@pytest.mark.parametrize(
    "options", [{"use_checkpoint": True}, {"use_checkpoint": True, "inputs_on_host": True}], ids=str
)
def test_dropout_is_repeated_when_computed_again(options):
    runs = []
    for more in ({}, options):
        unet = small_unet(dropout=0.5, **more)
        torch.manual_seed(3)
        runs.append(steps(unet, 2))
    assert are_close(runs[1], runs[0], 0)
    torch.manual_seed(4)
    assert not are_close(steps(small_unet(dropout=0.5), 2), runs[0], 1e-3)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize(("use_checkpoint", "num_again"), [(False, 0), (1, 1), (5, 5), (True, NUM_BLOCKS)])
def test_the_first_blocks_are_computed_again(use_checkpoint, num_again, on_host):
    unet = small_unet(use_checkpoint=use_checkpoint, inputs_on_host=on_host and use_checkpoint is not False)
    blocks = [layer for part in (*unet.input_blocks[1:], unet.middle_block, *unet.output_blocks) for layer in part]
    calls = [0] * len(blocks)

    def counter(number: int):
        def count(*_) -> None:
            calls[number] += 1

        return count

    for number, block in enumerate(blocks):
        first_part = next(part for part in block.modules() if not list(part.children()))
        first_part.register_forward_pre_hook(counter(number))
    steps(unet, 1)
    assert calls == [2] * num_again + [1] * (NUM_BLOCKS - num_again)


def bytes_of_a_frame(**options) -> SimpleNamespace:
    """Bytes of a frame on a GPU: kept between the passes, at the backward's peak, as inputs of blocks; no weights."""
    unet = {"target": "ldm.modules.unet.UNetModel", "params": SMALL | {"attention_resolutions": [1]} | options}
    encoder = {"target": "ldm.modules.encoders.KLFirstStage", "params": {}}
    params = {"unet_config": unet, "first_stage_config": encoder, "cond_stage_config": encoder, "trainable": REFERENCE}
    params["memory"] = {"weights": "bfloat16", "frozen": "bfloat16"}
    config = {"model": {"target": "ldm.models.diffusion.ddpm.LatentVideoDiffusion", "params": params}}
    config["lightning"] = {"trainer": {"precision": "bf16-mixed"}}
    sizes, of_transformers = [], []

    def note(layer: torch.nn.Module, given: tuple) -> None:
        if isinstance(layer, (ResBlock, SpatialTransformer, Upsample, Downsample)):
            sizes.append(given[0].nbytes)
        if isinstance(layer, SpatialTransformer):
            of_transformers.append(given[0].nbytes)

    with register_module_forward_pre_hook(note):
        count = count_step(config, StepShape(1, NUM_FRAMES, 32, 32))
    peak = count.peaks["backward"].kinds["activations and buffers"]
    found = {"kept": count.held, "peak": peak, "inputs": sum(sizes[:NUM_BLOCKS]), "on_host": count.on_host}
    found["parts"] = sum(of_transformers[:NUM_TRANSFORMERS])
    return SimpleNamespace(**{name: num_bytes / NUM_FRAMES for name, num_bytes in found.items()})


@pytest.fixture(scope="module")
def frames() -> dict[str, SimpleNamespace]:
    again = {"use_checkpoint": True}
    kinds = {"plain": {}, "again": again, "chunks": again | {"feed_forward_frames": 1}}
    kinds["host"] = again | {"feed_forward_frames": 1, "inputs_on_host": True}
    return {kind: bytes_of_a_frame(**options) for kind, options in kinds.items()}


@pytest.mark.slow
def test_checkpointing_keeps_only_the_inputs_of_blocks(frames):
    """Besides them, what the first convolution and the last layers keep, and latents."""
    again, features, latents = frames["again"], 32 * 32 * 32, 32 * 32 * 4
    ends = features * 2 + features * (4 + 2 + 2)  # convolution over frames; norm in float32, SiLU, convolution
    assert again.inputs <= again.kept <= again.inputs + ends + 14 * latents * 4
    assert again.kept < 0.15 * frames["plain"].kept


def test_chunks_remove_the_feed_forward_from_the_peak(frames):
    hidden = 32 * 32 * 4 * 32 * 2  # one of its wide buffers for a frame, of which the two halves make the widest
    assert frames["again"].peak - frames["chunks"].peak > 2 * hidden


def test_inputs_on_the_host_leave_the_gpu(frames):
    host, chunks = frames["host"], frames["chunks"]
    assert chunks.kept - host.kept == pytest.approx(chunks.inputs, rel=0.02)
    assert host.on_host == pytest.approx(chunks.inputs + 5 * chunks.parts, rel=0.01)  # transformers in six parts
    assert host.peak < chunks.peak - 0.5 * chunks.inputs
    assert chunks.on_host == 0


def test_inputs_on_the_host_are_copies_and_the_originals_are_freed():
    unet = small_unet(use_checkpoint=True, inputs_on_host=True)
    seen = []
    unet.output_blocks[0][0].register_forward_pre_hook(lambda _, given: seen.append(weakref.ref(given[0])))
    loss = unet(torch.zeros(1, 3, 4, 8, 8), torch.tensor([3]), torch.zeros(1, 7, 16)).square().mean()
    gc.collect()
    assert seen[0]() is None
    loss.backward()
    assert len(seen) == 2


class NotedMemory(HostMemory):
    """Records the sizes of copies."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[str, int]] = []

    def send(self, x):
        self.notes.append(("send", len(x)))
        return super().send(x)

    def bring(self, host, device):
        self.notes.append(("bring", len(host)))
        return super().bring(host, device)


def test_the_input_before_is_prefetched():
    memory, inputs = NotedMemory(), [torch.randn(size, requires_grad=True) for size in (1, 2, 3)]
    copies = [memory.keep(x) for x in inputs]
    assert all(one.take() is x for one, x in zip(copies, inputs, strict=True))
    assert memory.notes == [("send", 1), ("send", 2), ("send", 3)]
    memory.notes.clear()
    for number, expected in ((2, [("bring", 3), ("bring", 2)]), (1, [("bring", 1)]), (0, [])):
        x = copies[number].take()
        assert torch.equal(x, inputs[number]) and x is not inputs[number] and x.requires_grad
        assert memory.notes == expected
        memory.notes.clear()


def test_a_copy_of_the_network_keeps_inputs_of_its_own():
    unet = small_unet(use_checkpoint=True, inputs_on_host=True)
    other = copy.deepcopy(unet)
    memories = [network.middle_block.runs[0].keywords["memory"] for network in (unet, other)]
    assert memories[0] is unet.output_blocks[0].runs[0].keywords["memory"]
    assert memories[0] is not memories[1]
    assert are_close(steps(other, 2), steps(unet, 2), 0)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 7])
@pytest.mark.parametrize("trained", ["all", "weights", "input", "first"])
def test_chunks_have_the_gradients_of_the_whole(num_rows, trained):
    torch.manual_seed(0)
    block = BasicTransformerBlock(16, 2, 8).double()
    weights = [*block.norm3.parameters(), *block.ff.parameters()]
    for number, weight in enumerate(weights):
        weight.requires_grad_(trained in ("all", "weights") or (trained == "first" and number == 0))
    x = torch.randn(5, 3, 16, dtype=torch.float64, requires_grad=trained in ("all", "input"))
    wanted = [tensor for tensor in (x, *weights) if tensor.requires_grad]
    whole, parts = block._feed_forward_whole(x), in_chunks(block._feed_forward_whole, weights, x, num_rows)
    assert torch.allclose(parts, whole, rtol=1e-13, atol=1e-13)
    slope = torch.randn(whole.shape, dtype=torch.float64)
    found, expected = (torch.autograd.grad(out, wanted, slope) for out in (parts, whole))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_chunks_sum_half_precision_gradients_in_single():
    weight = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    rows = torch.tensor([256.0] + [1.0] * 64, dtype=torch.bfloat16)[:, None]  # 256 + 1 = 256 in bfloat16
    in_chunks(lambda part: part * weight, [weight], rows, 1).sum().backward()
    assert weight.grad.item() == 320


def test_images_and_inference_give_the_same():
    plain, chunked = small_unet(), small_unet(feed_forward_frames=2, use_checkpoint=True, inputs_on_host=True)
    x, context = torch.randn(3, 4, 8, 8), torch.randn(3, 7, 16)
    expected = plain(x, torch.tensor([1, 2, 3]), context)
    assert torch.equal(chunked(x, torch.tensor([1, 2, 3]), context), expected)
    with torch.no_grad():
        assert torch.equal(chunked(x, torch.tensor([1, 2, 3]), context), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_checkpoint": 0}, r"use_checkpoint: expected true .* how many of the network's 14 blocks.*found 0"),
        ({"use_checkpoint": 15}, r"use_checkpoint: .* 14 blocks, the first ones, found 15"),
        ({"use_checkpoint": -1}, r"use_checkpoint: .* found -1"),
        ({"use_checkpoint": "all"}, r"use_checkpoint: .* found 'all'"),
        ({"feed_forward_frames": 0}, r"feed_forward_frames: expected .* at least 1, or null for all of them, found 0"),
        ({"feed_forward_frames": True}, r"feed_forward_frames: expected .* found True"),
        ({"feed_forward_frames": 1.5}, r"feed_forward_frames: expected .* found 1\.5"),
        ({"inputs_on_host": 1}, r"inputs_on_host: expected true or false, found 1"),
        ({"inputs_on_host": True}, r"inputs_on_host: .* use_checkpoint: false.* set use_checkpoint: true, or"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message), torch.device("meta"):
        UNetModel(**SMALL | options)


def test_options_of_the_wrong_type_are_refused_in_configs():
    options = "model.params.unet_config.params"
    check(load_config(["configs/video-sd.yaml"], [f"{options}.use_checkpoint=12", f"{options}.feed_forward_frames=1"]))
    for key, value in (("use_checkpoint", "most"), ("feed_forward_frames", "0.5"), ("inputs_on_host", "3")):
        with pytest.raises(ConfigError, match=f"{options}.{key}: expected"):
            check(load_config(["configs/video-sd.yaml"], [f"{options}.{key}={value}"]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("options", SWITCHES, ids=str)
def test_on_a_gpu_the_numbers_are_the_same_and_the_host_never_waits(options):
    expected = steps(small_unet(device="cuda"), 3)
    unet = small_unet(device="cuda", **options)
    assert are_close(steps(unet, 3), expected, 1e-5)
    x, context = torch.randn(1, 5, 4, 8, 8, device="cuda"), torch.randn(1, 7, 16, device="cuda")
    timesteps = torch.tensor([3], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        unet(x, timesteps, context).square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
