"""One training step of a config, taken on tensors without values and followed byte by byte.

The network, the loss, autocast, checkpointing and all else that a step does are the code that training runs; only the
tensors are fake. So are two things simplified: the optimiser's states and what its step needs beside them are bytes a
weight, found by a step of the same optimiser on a small weight with values (`optimizer_bytes`), and the averages are
reckoned from their number. Single frames beside clips are counted as clips, and of the memory on a card the kernels'
workspaces, the allocator's gaps and the driver's context are left out: `ALLOWANCE` stands for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.config import build, to_container
from ldm.data.shards import DATASET_FILE, read_info
from ldm.diffusion.known_frames import KnownFrames
from ldm.errors import UserError
from ldm.modules.backends import choosing_for_gpu
from ldm.optim import build_optimizer
from ldm.optim.per_weight import WeightByWeight, state_bytes
from ldm.optim.stored_weights import StoredWeights
from ldm.planning.live_tensors import LiveTensors, Peak, autocast_as_on_a_card
from ldm.video import parse_size

LEAST_QUANTISED = 4096  # smaller weights keep their states in float32, in torchao and in bitsandbytes
SHAPES = ((512, 512), (512,))


@dataclass(frozen=True)
class OptimizerBytes:
    """states_each, states_small: of a weight of at least, or fewer than, `LEAST_QUANTISED` numbers, for each number.

    scratch_each: beside weight, gradient and states while weights are updated.  one_by_one: they are, so that only the
    largest needs it; otherwise all at once.
    """

    states_each: float
    states_small: float
    scratch_each: float
    one_by_one: bool

    def states(self, size: int) -> int:
        """Of a weight of so many numbers."""
        return round(size * (self.states_each if size >= LEAST_QUANTISED else self.states_small))

    def scratch(self, sizes: Sequence[int]) -> int:
        """For a step of weights of these sizes."""
        return round(self.scratch_each * (max(sizes) if self.one_by_one else sum(sizes)))


def measure_optimizer(
    options: Mapping[str, Any], weights: str, in_backward: bool, is_on_card: bool = True
) -> OptimizerBytes:
    """Measure the optimiser of these options, over weights stored as `model.params.memory.weights` has it."""
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    return _measure(tuple(sorted(options.items())), weights, in_backward, is_on_card)


@lru_cache
def _measure(options: tuple[tuple[str, Any], ...], weights: str, in_backward: bool, is_on_card: bool) -> OptimizerBytes:
    own = dict(options)
    found = [_step(lambda groups, **words: build_optimizer(groups, **own, **words), s, weights) for s in SHAPES]
    states = (state_bytes(optimizer) / prod(shape) for (optimizer, _), shape in zip(found, SHAPES, strict=True))
    optimizer, scratch = found[0]
    is_ours = isinstance(optimizer, WeightByWeight) or in_backward
    if is_on_card:
        scratch = _step(_in_one_kernel, SHAPES[0], weights)[1] if is_ours else 0
    return OptimizerBytes(*states, scratch / prod(SHAPES[0]), is_ours or not isinstance(optimizer, torch.optim.AdamW))


def _step(
    make: Callable[..., torch.optim.Optimizer], shape: tuple[int, ...], weights: str
) -> tuple[torch.optim.Optimizer, int]:
    """An optimiser after two steps of one weight, and the bytes that the second one took for a moment."""
    network = nn.ParameterList([nn.Parameter(torch.ones(shape))])
    stored = StoredWeights(network, weights)
    optimizer = make([{"params": list(network), "lr": 1e-3}], weights=None if weights == "float32" else stored)
    live = LiveTensors(network, torch.device("cpu"))
    for phase in ("first step", "second step"):
        network[0].grad = torch.zeros_like(network[0])
        live.label("known", [network[0], network[0].grad, *stored.buffers()])
        before = live.live
        with live.during(phase):
            optimizer.step()
    return optimizer, live.peaks["second step"].total - before


def _in_one_kernel(groups: list[dict[str, Any]], weights: StoredWeights | None) -> WeightByWeight:
    return WeightByWeight(groups, lambda groups: torch.optim.AdamW(groups, fused=True), weights)


GIB = 2**30
ALLOWANCE = (0.6 * GIB, 1.0 * GIB)  # for what is on a card beside tensors: context, workspaces, gaps
NUM_TOKENS, PIXELS_PER_LATENT = 77, 8
DEFAULT_SIZE = 512  # pixels, where nothing says another
MODEL = "ldm.models.diffusion.ddpm.LatentVideoDiffusion"
TRAINED, FROZEN, GRADIENTS = "trained weights", "frozen weights", "gradients"
STATES, AVERAGE, SCRATCH = "optimiser states", "average", "the optimiser's own"
CARD, PROCESSOR = "card", "processor"
# Back ends whose packages need not be here to count: what stands for them holds as much.
COUNTED_AS = {"flash_attn": "sdpa", "xformers": "sdpa", "triton": "auto"}


@dataclass(frozen=True)
class Shape:
    """What a step is made of: clips, frames of each, and height and width of the latents."""

    clips: int
    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.clips} x {self.frames} frames of {self.width}x{self.height} latents"


@dataclass(frozen=True)
class Count:
    """What a training step takes; bytes, and floating-point operations.

    sizes: of weights, gradients, states and average, wherever they lie.  held: by the forward pass for the backward
        pass.  peaks: the highest moment of each phase.  on_host: bytes in host memory at their most.
    flop: of the step; `again` of it in blocks that are computed again.
    """

    shape: Shape
    sizes: dict[str, int]
    held: int
    peaks: dict[str, Peak]
    on_host: int
    flop: int
    again: int
    num_trained: int
    num_parameters: int

    @property
    def peak(self) -> Peak:
        return max(self.peaks.values(), key=lambda peak: peak.total)


def shape_of(config: Mapping[str, Any], size: tuple[int, int] | None = None) -> Shape:
    """The step that a config describes.

    size: height and width in pixels; None: those of the prepared clips where they are there, else `prepare.size`, else
        512.
    """
    data = (config.get("data") or {}).get("params") or {}
    numbers = {name: data.get(name, least) for name, least in (("batch_size", 1), ("frames", 1))}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"data.params.{name}: expected a whole number of at least 1, found {value!r}")
    root = Path(str(data.get("root", "")))
    if size is None and (root / DATASET_FILE).is_file():
        height, width = read_info(root).moments_shape[-2:]
    else:
        given = (config.get("prepare") or {}).get("size", DEFAULT_SIZE) if size is None else size
        pixels = pixels_per_latent(config)
        height, width = (side // pixels for side in parse_size(given, "prepare.size"))
    return Shape(numbers["batch_size"], numbers["frames"], height, width)


def pixels_per_latent(config: Mapping[str, Any]) -> int:
    """Along a side, as the first stage's `ch_mult` has it; 8 where it says nothing."""
    first_stage = (config["model"].get("params") or {}).get("first_stage_config") or {}
    levels = ((first_stage.get("params") or {}).get("ddconfig") or {}).get("ch_mult")
    return PIXELS_PER_LATENT if levels is None else 2 ** (len(levels) - 1)


def count_step(config: Mapping[str, Any], shape: Shape, machine: str = CARD) -> Count:
    """Count a training step on a "card" or the "processor". Raises `UserError` as the parts of the config do."""
    config = to_container(config)
    settings = _Settings.of_config(config)
    device = torch.device("meta" if machine == CARD else "cpu")
    is_in_half = settings.precision != "32-true"
    dtype = torch.float16 if settings.precision == "16-mixed" else torch.bfloat16
    optimizer = measure_optimizer(settings.optimizer, settings.weights, settings.in_backward, machine == CARD)
    with ExitStack() as stack:
        if machine == CARD:
            stack.enter_context(autocast_as_on_a_card())
            stack.enter_context(choosing_for_gpu())
        fake = stack.enter_context(FakeTensorMode())
        fake.allow_meta = True  # the device that stands for a card
        with device:
            model = build(settings.model, "model", learning_rate=1.0)
        live = LiveTensors(model, device)
        weights = list(model.unet.parameters())
        sizes = _label_weights(live, model, weights)
        num_averaged = [w.numel() for w in weights if w.requires_grad]
        sizes[STATES] = sum(map(optimizer.states, num_averaged))
        sizes[AVERAGE] = _average_bytes(settings.average, weights)
        live.reserve(STATES, sizes[STATES], is_here=not settings.states_on_host or machine == PROCESSOR)
        on_host = (settings.average or {}).get("device") == "cpu" and machine == CARD
        live.reserve(AVERAGE, sizes[AVERAGE], is_here=not on_host)
        gradients = _follow_gradients(live, weights, settings.in_backward, optimizer)
        batch = _batch(model, shape, device)
        with live.during("forward"), torch.autocast("cpu", dtype, enabled=is_in_half):
            loss = _loss(model, batch)
        held = live.kinds.get("activations and buffers", 0)
        with live.during("backward"):
            loss.backward()
        del loss
        if not settings.in_backward:
            with live.during("optimiser step"):
                live.note_more(SCRATCH, optimizer.scratch(num_averaged))
        sizes[GRADIENTS] = max(gradients) if settings.in_backward else sum(gradients)
    return Count(
        shape, sizes, held, live.peaks, live.most_elsewhere, live.flop, live.flop_again, sum(num_averaged),
        sum(w.numel() for w in weights),
    )  # fmt: skip


@dataclass
class _Settings:
    """What of a config matters to a count."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    average: dict[str, Any] | None
    precision: str
    weights: str
    in_backward: bool
    states_on_host: bool

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> _Settings:
        model = config.get("model") or {}
        if model.get("target") != MODEL:
            raise UserError(
                f"model.target: expected {MODEL}, whose steps are what is counted, found {model.get('target')!r}"
            )
        params = dict(model.get("params") or {})
        unet = dict(params.get("unet_config") or {})
        words = dict(unet.get("params") or {})
        backend = words.get("attention_backend")
        words["attention_backend"] = COUNTED_AS.get(backend, backend or "sdpa")
        unet["params"] = words
        memory, optimizer = params.get("memory") or {}, params.get("optimizer") or {}
        params |= {"ckpt_path": None, "unet_config": unet, "optimizer": None}  # neither read nor built here
        params["scale_factor"] = params.get("scale_factor") or 1.0
        lightning = config.get("lightning") or {}
        trainer = lightning.get("trainer") or {}
        average = (lightning.get("callbacks") or {}).get("average")
        return cls(
            model={"target": MODEL, "params": params},
            optimizer=optimizer,
            average=None if average is None else average.get("params") or {},
            precision=str(trainer.get("precision") or "32-true"),
            weights=memory.get("weights", "float32"),
            in_backward=memory.get("step_in_backward", False),
            states_on_host=optimizer.get("states_on") == "host",
        )


def _label_weights(live: LiveTensors, model: nn.Module, weights: list[nn.Parameter]) -> dict[str, int]:
    """Tell the kinds of what is there before the step; the lower bits of split weights are weights."""
    live.label("schedule", model.buffers())
    lower = list(model.stored_weights.buffers())
    return {
        TRAINED: live.label(TRAINED, [*(w for w in weights if w.requires_grad), *lower]),
        FROZEN: live.label(FROZEN, [w for w in weights if not w.requires_grad]),
        GRADIENTS: 0,  # until they come
    }


def _average_bytes(words: dict[str, Any] | None, weights: list[nn.Parameter]) -> int:
    if words is None:
        return 0
    in_two = words.get("dtype", "float32") == "bfloat16"
    return sum(w.numel() * (2 if in_two and w.ndim > 1 else 4) for w in weights if w.requires_grad)


def _follow_gradients(
    live: LiveTensors, weights: list[nn.Parameter], in_backward: bool, optimizer: OptimizerBytes
) -> list[int]:
    """Name gradients as they appear, and drop them if the step is taken at once. Returns their sizes, as they come."""
    sizes: list[int] = []

    def on_gradient(weight: nn.Parameter) -> None:
        sizes.append(live.label(GRADIENTS, [weight.grad]))
        if in_backward:
            live.note_more(SCRATCH, optimizer.scratch([weight.numel()]))
            weight.grad = None

    for weight in weights:
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(on_gradient)
    return sizes


def _batch(model: nn.Module, shape: Shape, device: torch.device) -> tuple[Any, ...]:
    """What `LatentVideoDiffusion.error` takes, without values."""

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, device=device)

    b, t, c = shape.clips, shape.frames, model.unet.out_channels
    clean, noise = (empty(b, t, c, shape.height, shape.width) for _ in range(2))
    steps = torch.zeros(b, dtype=torch.long, device=device)
    known = None
    if model.mixture is not None and t > 1:
        known = KnownFrames(empty(b, t, 1, shape.height, shape.width), torch.empty_like(clean), steps)
    return clean, noise, steps, empty(b, NUM_TOKENS, model.unet.context_dim), empty(b), known


def _loss(model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
    """As `LatentVideoDiffusion.training_step` has it."""
    return (model.error(*batch) * model.schedule.loss_weight(batch[2], model.min_snr_gamma)).sum()
