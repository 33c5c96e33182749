"""The sections `kernels` (temporal layers beside other implementations) and `trace` (kernels of the training step)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ldm.errors import UserError
from ldm.modules.temporal import TemporalAttention, TemporalConv
from scripts.dev.benchmarking.contestants import PRECISIONS, Case
from scripts.dev.benchmarking.rows import GOALS, BenchmarkRow
from scripts.dev.benchmarking.steps import TrainingStep
from scripts.dev.benchmarking.timing import Budget, Seconds, ratios, take_turns, wait_for

WARM_UPS, NUM_SHARES = 3, 3
TURN_FLOP = 4e9  # on a CPU small layers repeat until a turn computes this


def compare_convolutions(
    case: Case, device: torch.device, rounds: int, budget: Budget, trained: bool, goal: str | None = None
) -> Iterator[BenchmarkRow]:
    """The temporal convolution as a view on channels-last memory, as a folded Conv1d and as a Conv3d.

    It has the channels of the first level. trained: forward and backward, as in training, or forward only, as in
    sampling. goal: key in `GOALS` of our speed-up over the folded one.
    """
    frames, side, channels, dtype = case.frames, case.side, case.widths[0], PRECISIONS[case.precision]
    layer = TemporalConv(channels).to(device, dtype).requires_grad_(trained)
    torch.nn.init.normal_(layer.weight, std=channels**-0.5)
    x, gradient = (torch.randn(case.batch * frames, channels, side, side, device=device).to(dtype) for _ in range(2))
    x, gradient = (each.contiguous(memory_format=torch.channels_last) for each in (x, gradient))

    def folded() -> Tensor:
        rows = rearrange(x, "(b t) c h w -> (b h w) c t", t=frames)
        rows = F.conv1d(rows, layer.weight, layer.bias, padding=1)
        rows = rearrange(rows, "(b h w) c t -> (b t) c h w", h=side, w=side)
        return rows.contiguous(memory_format=torch.channels_last)  # the layout that the next layer expects

    def conv3d() -> Tensor:
        clip = rearrange(x, "(b t) c h w -> b c t h w", t=frames)
        clip = F.conv3d(clip, layer.weight[..., None, None], layer.bias, padding=(1, 0, 0))
        out = rearrange(clip, "b c t h w -> (b t) c h w")
        return out.contiguous(memory_format=torch.channels_last)

    forward = {"ours": lambda: layer(x, frames), "folded": folded, "conv3d": conv3d}
    titles = {"ours": "ours, a view", "folded": "pixels folded into a Conv1d", "conv3d": "Conv3d"}
    with torch.no_grad():
        reference = forward["ours"]()
        for name in ("folded", "conv3d"):
            _check_alike(reference, forward[name](), name)
    x.requires_grad_(trained)
    wanted = [x, *layer.parameters()]
    backward = {name: lambda way=way: torch.autograd.grad(way(), wanted, gradient) for name, way in forward.items()}
    flop = 2 * 3 * channels**2 * case.batch * frames * side**2 * (3 if trained else 1)
    what = "forward and backward" if trained else "forward"
    title = f"temporal convolution, {what}, {_size(case)}"
    with torch.set_grad_enabled(trained):
        rows = list(_rows(title, backward if trained else forward, titles, flop, device, rounds, budget))
    if goal in GOALS:
        rows[1].found = {goal: 1 / rows[1].ratio}
    yield from rows


def _size(case: Case) -> str:
    return f"{case.batch} x {case.frames} frames, {case.widths[0]} channels, {case.side}x{case.side}, {case.precision}"


def compare_attentions(case: Case, device: torch.device, rounds: int, budget: Budget) -> Iterator[BenchmarkRow]:
    """Temporal attention, forward and backward: our automatic choice, torch's SDPA and plain matrix products."""
    batch, frames, side, channels, precision = case.batch, case.frames, case.side, case.widths[0], case.precision
    dtype = PRECISIONS[precision]
    x = torch.randn(batch * frames, side**2, channels, device=device).to(dtype).requires_grad_()
    torch.manual_seed(42)
    layers = {name: TemporalAttention(channels, 8, backend) for name, backend in _backends(device).items()}
    state = next(iter(layers.values())).state_dict()
    state["to_out.weight"] = torch.eye(channels)
    ways: dict[str, Callable[[], Tensor]] = {}
    for name, layer in layers.items():
        layer.load_state_dict(state)
        layer.to(device, dtype)
        ways[name] = lambda layer=layer: layer(x, frames).sum().backward()
        with torch.no_grad():
            _check_alike(layers["ours"](x, frames), layer(x, frames), name)
    titles = {"ours": "ours", "sdpa": "torch's SDPA", "math": "products and a softmax"}
    rows = 8 * batch * side**2
    flop = 3 * (2 * 2 * rows * frames**2 * channels // 8 + 4 * 2 * batch * frames * side**2 * channels**2)
    title = f"temporal attention, forward and backward, {_size(case)}"
    yield from _rows(title, ways, titles, flop, device, rounds, budget)


def _backends(device: torch.device) -> dict[str, str]:
    own = "triton" if device.type == "cuda" else "auto"
    try:
        TemporalAttention(32, 8, own)
    except UserError:
        own = "sdpa"
    return {"ours": own, "sdpa": "sdpa", "math": "math"}


def _rows(
    case: str, ways: dict[str, Callable[[], Tensor]], titles: dict[str, str], flop: float, device: torch.device,
    rounds: int, budget: Budget,
) -> Iterator[BenchmarkRow]:  # fmt: skip
    times = max(1, round(TURN_FLOP / flop)) if device.type == "cpu" else 1

    def repeated(way: Callable[[], object]) -> None:
        for _ in range(times):
            way()

    for way in ways.values():
        repeated(way)
    turns = {name: lambda way=way: repeated(way) for name, way in ways.items()}
    taken = take_turns(turns, rounds, device, budget)
    seconds = {name: [each / times for each in turn] for name, turn in taken.items()}
    found = ratios(seconds, "ours")
    for name, title in titles.items():
        yield BenchmarkRow("kernels", case, title, Seconds.of(seconds[name]), found.get(name), flop)


def _check_alike(first: Tensor, second: Tensor, name: str) -> None:
    difference = (first.float() - second.float()).abs().max() / first.float().abs().max()
    assert difference < 0.05, f"{name} computes a different result, off by {difference:.3g}"


def trace(case: Case, device: torch.device) -> Iterator[BenchmarkRow]:
    """The kernels with the largest shares of our training step, by torch's profiler."""
    step = TrainingStep("ours", case, device)
    for _ in range(WARM_UPS):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    wait_for(device)
    with profile(activities=activities) as profiler:
        step()
        wait_for(device)
    on_gpu = device.type == "cuda"
    times = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profiler.key_averages()
        if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA
    }
    total = sum(times.values())
    kernels = [key for key in times if on_gpu or ("::" in key and not key.startswith("autograd"))]
    for rank, key in enumerate(sorted(kernels, key=times.get, reverse=True)[:NUM_SHARES], 1):
        name = key if len(key) < 80 else f"{key[:77]}..."
        note = f"{times[key] / total:.0%} of the step"
        yield BenchmarkRow("trace", f"{case}, {case.precision}", f"{rank}. {name.replace('|', '/')}", note=note)
