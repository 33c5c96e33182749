"""One training step of a config, taken on tensors without values and followed byte by byte.

The step is the model's own `training_step`: network, loss, autocast, checkpointing are the code that training runs;
only the tensors are fake, and given instead of drawn. Two things are simplified. The optimiser is measured by two steps
of it on small weights with values, as bytes a weight (`measure_optimizer`); the bytes of averages are computed from
their number. Single frames beside clips are counted as clips. On a GPU, kernel workspaces, gaps of the allocator and
the driver's context are not counted: `ALLOWANCE` stands for them.
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
from ldm.data.shards import DATASET_FILE, DatasetError, DatasetInfo, read_info
from ldm.diffusion.known_frames import KnownFrames
from ldm.errors import UserError
from ldm.modules.backends import choosing_for_gpu
from ldm.optim import build_optimizer
from ldm.optim.per_weight import WeightByWeight, state_bytes
from ldm.optim.stored_weights import StoredWeights
from ldm.planning.live_tensors import OTHER, LiveTensors, Peak, gpu_autocast
from ldm.video import parse_size

LEAST_QUANTISED = 4096  # smaller weights keep their states in float32, in torchao and in bitsandbytes
SHAPES = ((512, 512), (512,))


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes for each number of a weight.

    states_each, states_small: states of a weight of at least, or fewer than, `LEAST_QUANTISED` numbers.
    scratch_each: beside weight, gradient and states during the update; with `one_by_one` only for the largest weight,
        otherwise for all at once.
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
    options: Mapping[str, Any], weights: str, in_backward: bool, is_on_gpu: bool = True
) -> OptimizerBytes:
    """Measure the optimiser of these options, over weights stored as `model.params.memory.weights`.

    On a GPU, libraries update a weight in place with one compiled kernel; only the float32 copies of weights that are
    stored otherwise count.
    """
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    return _measure(tuple(sorted(options.items())), weights, in_backward, is_on_gpu)


@lru_cache
def _measure(options: tuple[tuple[str, Any], ...], weights: str, in_backward: bool, is_on_gpu: bool) -> OptimizerBytes:
    own = dict(options)
    found = [_step(lambda groups, **more: build_optimizer(groups, **own, **more), s, weights) for s in SHAPES]
    states = (state_bytes(optimizer) / prod(shape) for (optimizer, _), shape in zip(found, SHAPES, strict=True))
    optimizer, scratch = found[0]
    is_ours = isinstance(optimizer, WeightByWeight) or in_backward
    if is_on_gpu:
        scratch = _step(_in_one_kernel, SHAPES[0], weights)[1] if is_ours else 0
    return OptimizerBytes(*states, scratch / prod(SHAPES[0]), is_ours or not isinstance(optimizer, torch.optim.AdamW))


def _step(
    make: Callable[..., torch.optim.Optimizer], shape: tuple[int, ...], weights: str
) -> tuple[torch.optim.Optimizer, int]:
    """An optimiser after two steps of one weight, and the temporary bytes of the second one."""
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
ALLOWANCE = (0.6 * GIB, 1.0 * GIB)  # on a GPU beside tensors: context, workspaces, gaps
NUM_TOKENS, PIXELS_PER_LATENT = 77, 8
DEFAULT_SIZE = 512  # pixels
MODEL = "ldm.models.diffusion.ddpm.LatentVideoDiffusion"
TRAINED, FROZEN, GRADIENTS = "trained weights", "frozen weights", "gradients"
STATES, AVERAGE, SCRATCH = "optimiser states", "average", "the optimiser's own"
GPU, CPU = "GPU", "CPU"
# Attention back ends that need not be installed to count: the stand-in keeps as much in memory.
COUNTED_AS = {"flash_attn": "sdpa", "xformers": "sdpa", "triton": "auto"}


@dataclass(frozen=True)
class StepShape:
    """Clips of a step, frames of each, height and width of the latents."""

    clips: int
    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.clips} x {self.frames} frames of {self.width}x{self.height} latents"


@dataclass(frozen=True)
class StepCount:
    """What a training step takes: bytes, and floating-point operations.

    sizes: of weights, gradients, states and average, wherever they lie.  held: from the forward to the backward pass.
    peaks: the highest moment of each phase.  on_host: peak in host memory.  flop: of the step; `again`: of these, in
    recomputed blocks.
    """

    shape: StepShape
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


def shape_of(config: Mapping[str, Any], size: tuple[int, int] | None = None) -> StepShape:
    """The step that a config describes, with latents as in `latent_size`. Raises `UserError` for its numbers."""
    data = (config.get("data") or {}).get("params") or {}
    numbers = {name: data.get(name, 1) for name in ("batch_size", "frames")}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"data.params.{name}: expected a whole number of at least 1, found {value!r}")
    return StepShape(numbers["batch_size"], numbers["frames"], *latent_size(config, size)[:2])


def latent_size(config: Mapping[str, Any], size: tuple[int, int] | None = None) -> tuple[int, int, str]:
    """Height and width of the latents, and where they come from.

    size: height and width in pixels; None: of the prepared clips where training would accept them, otherwise
    `prepare.size` or 512.
    """
    data, pixels = (config.get("data") or {}).get("params") or {}, pixels_per_latent(config)
    root, reason = Path(str(data.get("root", ""))), ""
    if size is None and (root / DATASET_FILE).is_file():
        try:
            info = read_info(root)
            reason = _refusal(config, info, pixels)
        except DatasetError as error:
            reason = str(error)
        if not reason:
            return *info.moments_shape[-2:], f"as prepared in {root}"
        reason = f"; not as in {root}, which training would refuse: {reason}"
    given = (config.get("prepare") or {}).get("size", DEFAULT_SIZE) if size is None else size
    height, width = parse_size(given, "prepare.size")
    return height // pixels, width // pixels, f"of {width}x{height} pixels{reason}"


def _refusal(config: Mapping[str, Any], info: DatasetInfo, pixels: int) -> str:
    """Why training would refuse prepared clips, as far as it is known without the encoders' weights."""
    params = config["model"].get("params") or {}
    unet = (params.get("unet_config") or {}).get("params") or {}
    if misfit := info.misfit(unet.get("out_channels", info.latent_channels), unet.get("context_dim", 768)):
        return misfit
    scale = params.get("scale_factor", 0.18215)
    if scale is not None and scale != info.scale_factor:
        return f"expected the scale factor {scale}, found {info.scale_factor:g}"
    if [side // pixels for side in info.size] != list(info.moments_shape[-2:]):
        found = " x ".join(map(str, info.moments_shape[-2:]))
        return f"expected an autoencoder of {pixels} pixels per latent, found latents of {found} for {info.size} pixels"
    return ""


def pixels_per_latent(config: Mapping[str, Any]) -> int:
    """Along a side, from the first stage's `ch_mult`; 8 without one."""
    first_stage = (config["model"].get("params") or {}).get("first_stage_config") or {}
    levels = ((first_stage.get("params") or {}).get("ddconfig") or {}).get("ch_mult")
    return PIXELS_PER_LATENT if levels is None else 2 ** (len(levels) - 1)


def count_step(config: Mapping[str, Any], shape: StepShape, machine: str = GPU) -> StepCount:
    """Count a training step on a "GPU" or a "CPU". Raises `UserError` as the parts of the config do."""
    config = to_container(config)
    model_node, options, memory = _counted_model(config)
    lightning = config.get("lightning") or {}
    precision = str((lightning.get("trainer") or {}).get("precision") or "32-true")
    average = (lightning.get("callbacks") or {}).get("average")
    in_backward = memory.get("step_in_backward", False)
    device = torch.device("meta" if machine == GPU else "cpu")
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    optimizer = measure_optimizer(options, memory.get("weights", "float32"), in_backward, machine == GPU)
    with ExitStack() as stack:
        if machine == GPU:
            stack.enter_context(gpu_autocast())
            stack.enter_context(choosing_for_gpu())
        fake = stack.enter_context(FakeTensorMode())
        fake.allow_meta = True  # the device that stands for a GPU
        with device:
            model = build(model_node, "model", learning_rate=1.0)
        live = LiveTensors(model, device)
        weights = list(model.unet.parameters())
        trained = [w for w in weights if w.requires_grad]
        sizes = _label_weights(live, model, weights)
        num_trained = [w.numel() for w in trained]
        sizes[STATES] = sum(map(optimizer.states, num_trained))
        live.reserve(STATES, sizes[STATES], is_here=options.get("states_on") != "host" or machine == CPU)
        average = None if average is None else average.get("params") or {}
        sizes[AVERAGE] = 0 if average is None else sum(_average_bytes(average, w) for w in trained)
        live.reserve(AVERAGE, sizes[AVERAGE], is_here=(average or {}).get("device") != "cpu" or machine == CPU)
        gradients = _follow_gradients(live, trained, in_backward, optimizer)
        batch = _Batch.without_values(model, shape, device)
        with live.during("forward"), torch.autocast("cpu", dtype, enabled=precision != "32-true"):
            loss = batch.loss_of(model)
        held = live.kinds.get(OTHER, 0)
        with live.during("backward"):
            loss.backward()
        del loss
        if not in_backward:
            with live.during("optimiser step"):
                live.note_more(SCRATCH, optimizer.scratch(num_trained))
        sizes[GRADIENTS] = max(gradients) if in_backward else sum(gradients)
    return StepCount(
        shape, sizes, held, live.peaks, live.most_elsewhere, live.flop, live.flop_again, sum(num_trained),
        sum(w.numel() for w in weights),
    )  # fmt: skip


def _counted_model(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The model's node without checkpoint and optimiser, and its params `optimizer` and `memory`."""
    model = config.get("model") or {}
    if model.get("target") != MODEL:
        raise UserError(f"model.target: expected {MODEL}, whose steps are counted, found {model.get('target')!r}")
    params = dict(model.get("params") or {})
    unet = dict(params.get("unet_config") or {})
    backend = (unet.get("params") or {}).get("attention_backend")
    unet["params"] = {**(unet.get("params") or {}), "attention_backend": COUNTED_AS.get(backend, backend or "sdpa")}
    options, memory = params.get("optimizer") or {}, params.get("memory") or {}
    params |= {"ckpt_path": None, "unet_config": unet, "optimizer": None}
    params["scale_factor"] = params.get("scale_factor") or 1.0
    return {"target": MODEL, "params": params}, options, memory


def _label_weights(live: LiveTensors, model: nn.Module, weights: list[nn.Parameter]) -> dict[str, int]:
    """Label what exists before the step; the lower bits of split weights are weights."""
    live.label("schedule", model.buffers())
    lower = list(model.stored_weights.buffers())
    return {
        TRAINED: live.label(TRAINED, [*(w for w in weights if w.requires_grad), *lower]),
        FROZEN: live.label(FROZEN, [w for w in weights if not w.requires_grad]),
        GRADIENTS: 0,  # until they exist
    }


def _average_bytes(options: Mapping[str, Any], weight: nn.Parameter) -> int:
    return weight.numel() * (2 if options.get("dtype") == "bfloat16" and weight.ndim > 1 else 4)


def _follow_gradients(
    live: LiveTensors, trained: list[nn.Parameter], in_backward: bool, optimizer: OptimizerBytes
) -> list[int]:
    """Label gradients as they appear, and drop them with steps in the backward pass. Returns their sizes in order."""
    sizes: list[int] = []

    def on_gradient(weight: nn.Parameter) -> None:
        sizes.append(live.label(GRADIENTS, [weight.grad]))
        if in_backward:
            live.note_more(SCRATCH, optimizer.scratch([weight.numel()]))
            weight.grad = None

    for weight in trained:
        weight.register_post_accumulate_grad_hook(on_gradient)
    return sizes


@dataclass
class _Batch:
    """What `training_step` reads of a batch, and what it draws, without values."""

    moments: Tensor  # here the latents
    noise: Tensor
    timesteps: Tensor
    context: Tensor
    fps: Tensor
    known: KnownFrames | None
    stills: None = None

    def __len__(self) -> int:
        return len(self.moments)

    @classmethod
    def without_values(cls, model: nn.Module, shape: StepShape, device: torch.device) -> _Batch:
        def empty(*sizes: int) -> Tensor:
            return torch.empty(sizes, device=device)

        b, t = shape.clips, shape.frames
        clean, noise = (empty(b, t, model.unet.out_channels, shape.height, shape.width) for _ in range(2))
        steps = torch.zeros(b, dtype=torch.long, device=device)
        known = None
        if model.mixture is not None and t > 1:
            known = KnownFrames(empty(b, t, 1, shape.height, shape.width), torch.empty_like(clean), steps)
        return cls(clean, noise, steps, empty(b, NUM_TOKENS, model.unet.context_dim), empty(b), known)

    def loss_of(self, model: nn.Module) -> Tensor:
        """The model's loss of this batch, with its draws."""
        model.draw = lambda *_: (self.moments, self.noise, self.timesteps)
        model.draw_known = lambda *_: self.known
        model.log = lambda *_, **__: None
        return model.training_step(self, 0)
