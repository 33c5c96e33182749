"""Parts of the rehearsal: a stand-in for the public checkpoint, sizes, weight comparison, and the measured step.

The stand-in has the format and size of Stable Diffusion v1's public checkpoint and random weights.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from ldm.checkpoint import full_state_dict, identity, is_temporal, read_checkpoint
from ldm.checkpoint.encoders import encoder_tensors, latent_scale
from ldm.checkpoint.names import FIRST_STAGE_PREFIX, TEXT_PREFIX, UNET_PREFIX, average_names
from ldm.config import build, to_container
from ldm.data.preparing.preparation import EncodingSettings, Preparation
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.experiments.tables import markdown_table
from ldm.files import write_atomically
from ldm.optim.parameter_groups import ParameterGroups
from ldm.planning.count import CPU, count_step, pixels_per_latent, shape_of
from scripts.dev.measuring import Measured

STATE_BYTES = {"adamw": 8, "adamw8bit": 2.04, "adamw4bit": 1.06}  # of the optimiser, per trained parameter
SPARE_BYTES = 10**9  # footage, prepared clips, logs, samples


@dataclass(frozen=True)
class RehearsalSizes:
    """Parameters of the video network, and bytes of the two large files of a rehearsal."""

    num_parameters: int
    num_trained: int
    image_file: int
    video_file: int


@dataclass(frozen=True)
class WeightComparison:
    """The effect of one training step on the tensors of a checkpoint.

    num_equal: untrained tensors that equal the image file bit for bit; `changed` differ.
    num_updated: trained tensors that changed; `unchanged` did not. `idle` did not and cannot: they lie before layers
        that are initialised to zero and pass no gradient (the output of temporal attention, the last layers of the
        embeddings of frame rate and noise level).
    """

    num_equal: int
    changed: list[str]
    num_updated: int
    unchanged: list[str]
    idle: list[str]


@dataclass
class RehearsalFiles:
    """The files of a rehearsal."""

    folder: Path
    footage: Path = field(init=False)
    image_file: Path = field(init=False)
    prepared: Path = field(init=False)
    samples: Path = field(init=False)

    def __post_init__(self) -> None:
        self.footage, self.image_file = self.folder / "footage", self.folder / "model.ckpt"
        self.prepared, self.samples = self.folder / "prepared", self.folder / "samples"

    @property
    def video_file(self) -> Path:
        return self.only("logs/*/checkpoints/last.ckpt")

    def only(self, pattern: str) -> Path:
        """The only file that matches; a successful stage has written it."""
        found = sorted(self.folder.glob(pattern))
        if len(found) != 1:
            raise UserError(f"{self.folder}: expected one file {pattern}, found {len(found)}; see the output above")
        return found[0]


def check_disk(folder: Path, sizes: RehearsalSizes) -> None:
    """Raise UserError unless the files fit on the disk."""
    needed = sizes.image_file + sizes.video_file + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: expected {needed / 1e9:.1f} GB of free disk ({sizes.image_file / 1e9:.1f} for the image "
            f"checkpoint, {sizes.video_file / 1e9:.1f} for the training checkpoint, {SPARE_BYTES / 1e9:.0f} to spare), "
            f"found {free / 1e9:.1f} GB; free some, or give a --workdir on another disk"
        )


def num_bytes_in(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def image_tensors(config: DictConfig | Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of the image model that a video config starts from, CompVis names; weights are meta tensors."""
    params = to_container(config)["model"]["params"]
    unet, first_stage, text_encoder = (dict(params[f"{part}_config"]) for part in ("unet", "first_stage", "cond_stage"))
    unet["params"] = {**unet["params"], "temporal": False}
    parts = [(unet, "unet_config"), (first_stage, "first_stage_config"), (text_encoder, "cond_stage_config")]
    with torch.device("meta"):
        networks = [build(node, f"model.params.{name}") for node, name in parts]
    state = full_state_dict(*networks, _schedule(params))
    return {name: tensor for name, tensor in state.items() if not is_temporal(name)}


def count_sizes(config: DictConfig | Mapping[str, Any]) -> RehearsalSizes:
    """The sizes of a rehearsal of a config, counted on meta tensors."""
    config = to_container(config)
    num_trained = num_temporal = num_parameters = 0
    for name, (num, is_trained) in _video_parameters(config).items():
        num_parameters += num
        num_temporal += num * is_temporal(name)
        num_trained += num * is_trained
    image_file = sum(tensor.numel() * tensor.element_size() for tensor in image_tensors(config).values())
    optimizer = (config["model"]["params"].get("optimizer") or {}).get("name", "adamw")
    per_trained = STATE_BYTES.get(optimizer, max(STATE_BYTES.values()))
    if ((config.get("lightning") or {}).get("callbacks") or {}).get("average"):
        per_trained += 4
    video_file = image_file + 4 * num_temporal + math.ceil(per_trained * num_trained)
    return RehearsalSizes(num_parameters, num_trained, image_file, video_file)


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A random weight that keeps activations of order one: unit gain for matrices and kernels, identity for norms."""
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith(".weight") else torch.zeros(shape)
    gain = 1.0 if "embedding" in name else shape[1:].numel() ** -0.5
    return gain * torch.randn(shape, generator=generator)


def write_public_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], contents: Mapping[str, Any], generator: torch.Generator
) -> None:
    """Write `{**contents, "state_dict": tensors}` as torch.save does, with one tensor in memory at a time.

    Meta tensors get random values.
    """
    structure = io.BytesIO()
    _StructurePickler(structure, protocol=2).dump({**contents, "state_dict": dict(tensors)})
    writer = torch._C.PyTorchFileWriter(str(path))  # as torch.save uses; public files were written by it
    writer.write_record("data.pkl", structure.getvalue(), structure.tell())
    for number, (name, tensor) in enumerate(tensors.items()):
        value = random_weight(name, tensor.shape, generator) if tensor.is_meta else tensor.contiguous()
        writer.write_record(f"data/{number}", value.untyped_storage(), value.nbytes)
    writer.write_end_of_file()


def compare(image_path: Path, video_path: Path, config: DictConfig | Mapping[str, Any]) -> WeightComparison:
    """Compare a checkpoint after one training step with the image file that training started from.

    The initial value of a weight that the image file lacks is that of its running average.
    """
    before, after = read_checkpoint(image_path).tensors, read_checkpoint(video_path).tensors
    trained = {UNET_PREFIX + name for name, (_, is_trained) in _video_parameters(config).items() if is_trained}
    averages = average_names(name.removeprefix(UNET_PREFIX) for name in trained)
    changed = [name for name in before if name not in trained and not _same(before[name], after.get(name))]
    unmoved = []
    for name in sorted(trained):
        start = before.get(name, after.get(averages[name.removeprefix(UNET_PREFIX)]))
        if start is None or _same(start, after.get(name)):
            unmoved.append(name)
    return WeightComparison(
        num_equal=len(before.keys() - trained) - len(changed),
        changed=changed,
        num_updated=len(trained) - len(unmoved),
        unchanged=[name for name in unmoved if not _is_idle(name)],
        idle=[name for name in unmoved if _is_idle(name)],
    )


@dataclass(frozen=True)
class _Storage:
    """The values of a tensor, written as a record of their own."""

    tensor: Tensor
    number: int


class _StructurePickler(pickle.Pickler):
    """Pickles tensors as torch.save does: a reference to a numbered record, and the shape."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._num_tensors = 0

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        storage = _Storage(obj, self._num_tensors)
        self._num_tensors += 1
        shape, strides = tuple(obj.shape), torch.empty(obj.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, shape, strides, False, OrderedDict())

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind = {torch.float32: torch.FloatStorage, torch.int64: torch.LongStorage}[obj.tensor.dtype]
        return "storage", kind, str(obj.number), "cpu", obj.tensor.numel()


def _video_parameters(config: DictConfig | Mapping[str, Any]) -> dict[str, tuple[int, bool]]:
    """Name of each parameter of the video network -> its size, and whether it is trained."""
    params = to_container(config)["model"]["params"]
    with torch.device("meta"):
        unet = build(params["unet_config"], "model.params.unet_config")
    trainable = params.get("trainable")
    ParameterGroups(unet, {"temporal": True} if trainable is None else trainable).freeze_the_rest()
    return {name: (weight.numel(), weight.requires_grad) for name, weight in unet.named_parameters()}


def _schedule(params: Mapping[str, Any]) -> NoiseSchedule:
    keys = ("timesteps", "linear_start", "linear_end", "parameterization")
    return NoiseSchedule(**{key: params[key] for key in keys if key in params})


def _same(first: Tensor, second: Tensor | None) -> bool:
    """Bitwise equality (0.0 and -0.0 differ); a second tensor in bfloat16 is compared in bfloat16."""
    if second is None or first.shape != second.shape or second.dtype not in (first.dtype, torch.bfloat16):
        return False
    first = first.to(second.dtype)
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second)))


def _is_idle(name: str) -> bool:
    before_attention = is_temporal(name) and ".transformer_blocks." in name and ".to_out." not in name
    return before_attention or any(f".conditioning.temporal.{part}.0." in name for part in ("fps", "known_level"))


TITLE = "## A step of each preset"
HEADER = [
    TITLE, "",
    "`python scripts/dev/rehearse.py --step-only --base configs/video-sd.yaml PRESET`: one step at full size on random "
    "latents, in a process that reads the image checkpoint and writes its own. Resident is the kernel's count of the "
    "whole process in GiB, with libraries and mapped checkpoint pages. Counted are the live tensors of the step "
    "on a CPU and on a GPU, as `scripts/plan.py` counts them. Seconds are with one thread on a machine that may be "
    "busy; a dash is a value that the system does not show.", "",
    *markdown_table(
        ["config", "clips x frames", "loss", "resident", "without mapped files", "counted: CPU", "GPU", "s", "date"], []
    ).splitlines(),
]  # fmt: skip
# glibc: freed blocks of 1 MiB or more return to the system at once and are not resident.
MALLOC_TRIM = ("MALLOC_MMAP_THRESHOLD_", str(2**20))
NUM_TOKENS = 77
GIB = 2**30


@dataclass(frozen=True)
class MeasuredStep:
    """A training step: measured, and counted in bytes on a CPU and on a GPU."""

    name: str
    size: str
    loss: float
    measured: Measured
    cpu_bytes: int
    gpu_bytes: int

    def row(self) -> str:
        """A row of the report's table."""
        sizes = (self.measured.peak_memory, self.measured.peak_own_memory, self.cpu_bytes, self.gpu_bytes)
        cells = ["-" if size is None else f"{size / GIB:.2f}" for size in sizes]
        cells = [self.name, self.size, f"{self.loss:.4f}", *cells, f"{self.measured.seconds:.0f}"]
        return f"| {' | '.join([*cells, date.today().isoformat()])} |"


def step_name(bases: Sequence[str], overrides: Sequence[str]) -> str:
    """The last config and its overrides, as a cell of the table."""
    return " ".join([Path(bases[-1]).stem, *(f"`{override}`" for override in overrides)])


def write_random_clips(folder: Path, config: DictConfig | Mapping[str, Any], image_file: Path) -> None:
    """A prepared set for one step of a config with the encoders of `image_file`; latents are Gaussian noise."""
    config = to_container(config)
    config["model"]["params"]["ckpt_path"] = str(image_file)
    shape, data = shape_of(config), config["data"]["params"]
    tensors = encoder_tensors(config)
    names = {
        prefix: identity({name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)})
        for prefix in (FIRST_STAGE_PREFIX, TEXT_PREFIX)
    }
    unet, pixels = config["model"]["params"]["unet_config"]["params"], pixels_per_latent(config)
    settings = EncodingSettings(
        first_stage=names[FIRST_STAGE_PREFIX],
        text_encoder=names[TEXT_PREFIX],
        scale_factor=latent_scale(config),
        fps=float((config.get("prepare") or {}).get("fps", 10)),
        size=[shape.height * pixels, shape.width * pixels],
        num_tokens=NUM_TOKENS,
    )
    making, random = Preparation(folder, settings), np.random.default_rng(0)

    def normal(*size: int) -> np.ndarray:
        return random.standard_normal(size, dtype=np.float32).astype(np.float16)

    making.store_empty_context(normal(NUM_TOKENS, unet["context_dim"]))
    length = (shape.frames - 1) * min(data.get("strides") or [1]) + 1
    for number in range(shape.clips):
        with making.video(f"random-{number}", f"{number:064x}", ["a road"]) as part:
            moments = normal(length, 2 * unet["out_channels"], shape.height, shape.width)
            part.add(range(length), moments, [normal(NUM_TOKENS, unet["context_dim"])])
    making.finish()


def measure_step(name: str, config: DictConfig | Mapping[str, Any], measured: Measured) -> MeasuredStep:
    """A measured training command with its loss and the counted memory of its step."""
    found = re.findall(r"\bloss (-?[\w.]+)", measured.output)
    config = to_container(config)
    shape = shape_of(config)
    counts = [count_step(config, shape, *machine).peak.total for machine in ((CPU,), ())]
    size = f"{shape.clips} x {shape.frames}"
    return MeasuredStep(name, size, float(found[-1]) if found else math.nan, measured, *counts)


def failures_of(step: MeasuredStep, most: float | None) -> list[str]:
    """What is wrong with a step. most: GB that may be resident; None: any."""
    found = [] if math.isfinite(step.loss) else [f"the loss is {step.loss}, not finite"]
    if most is not None and step.measured.peak_memory > most * 1e9:
        found.append(f"{step.measured.peak_memory / 1e9:.2f} GB resident, more than {most:g}")
    return found


def with_row(report: str, step: MeasuredStep) -> str:
    """A report with the step's row in its table; a row of the same name and size is replaced."""
    before, section = split_off(report)
    start = f"| {step.name} | {step.size} |"
    rows = [line for line in section.splitlines()[len(HEADER) :] if line and not line.startswith(start)]
    return "\n".join([before.rstrip("\n"), "", *HEADER, *rows, step.row(), ""]).lstrip("\n")


def write_row(path: Path, step: MeasuredStep) -> None:
    """Put the step's row into a report, which may not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, with_row(path.read_text(encoding="utf-8") if path.is_file() else "", step))


def with_rows_of(path: Path, report: str) -> str:
    """A new report with the table of steps of the report in a file, if it exists."""
    section = split_off(path.read_text(encoding="utf-8"))[1] if path.is_file() else ""
    return f"{report}\n{section}" if section else report


def split_off(report: str) -> tuple[str, str]:
    """A report without the table of steps at its end, and that table."""
    before, title, after = report.partition(TITLE)
    return before, title + after
