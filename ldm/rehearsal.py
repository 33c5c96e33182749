"""A stand-in for Stable Diffusion v1's public checkpoint, as large and of the same form, with random weights.

`scripts/rehearse.py` takes it through the whole road at full size: what is needed is counted here before, and what
training did to the weights is compared here after.
"""

from __future__ import annotations

import io
import math
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ldm.checkpoint import full_state_dict, is_temporal, read_checkpoint
from ldm.checkpoint_names import UNET_PREFIX, average_names
from ldm.config import build, to_container
from ldm.errors import UserError
from ldm.models.diffusion.parameter_groups import ParameterGroups
from ldm.models.diffusion.schedule import NoiseSchedule

STATE_BYTES = {"adamw": 8, "adamw8bit": 2.04, "adamw4bit": 1.06}  # of the optimiser, per trained parameter
SPARE_BYTES = 10**9  # footage, prepared clips, logs, samples


@dataclass(frozen=True)
class Sizes:
    """Parameters of the video network, and bytes of the two large files of a rehearsal."""

    num_parameters: int
    num_trained: int
    image_file: int
    video_file: int


@dataclass(frozen=True)
class Comparison:
    """What one training step did to the tensors of a checkpoint.

    num_equal: tensors of the image file that were not trained and are the same, bit for bit; `changed` are not.
    num_moved: trained tensors that are different; `still` are not. `idle` are not either, and cannot be yet: what lies
        before the output of temporal attention, and before the last layers of the embeddings of frame rate and noise,
        which start at zero and let no gradient through.
    """

    num_equal: int
    changed: list[str]
    num_moved: int
    still: list[str]
    idle: list[str]


@dataclass
class Place:
    """The files of a rehearsal in its folder."""

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
        """The one file of that name; a stage that ended well has written it."""
        found = sorted(self.folder.glob(pattern))
        if len(found) != 1:
            raise UserError(f"{self.folder}: expected one file {pattern}, found {len(found)}; look at the output above")
        return found[0]


def check_disk(folder: Path, sizes: Sizes) -> None:
    """Raise UserError unless the files will fit."""
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
    """Every tensor of the image model that a video config starts from, CompVis names; weights are without values."""
    params = to_container(config)["model"]["params"]
    unet, first_stage, text_encoder = (dict(params[f"{part}_config"]) for part in ("unet", "first_stage", "cond_stage"))
    unet["params"] = {**unet["params"], "temporal": False}
    parts = [(unet, "unet_config"), (first_stage, "first_stage_config"), (text_encoder, "cond_stage_config")]
    with torch.device("meta"):
        networks = [build(node, f"model.params.{name}") for node, name in parts]
    state = full_state_dict(*networks, _schedule(params))
    return {name: tensor for name, tensor in state.items() if not is_temporal(name)}


def count_sizes(config: DictConfig | Mapping[str, Any]) -> Sizes:
    """What a rehearsal of a config will write, counted without building anything; raises as its parts do."""
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
    return Sizes(num_parameters, num_trained, image_file, video_file)


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A value for a weight that keeps activations of order one: unit gain for matrices and kernels, norms at rest."""
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith(".weight") else torch.zeros(shape)
    gain = 1.0 if "embedding" in name else shape[1:].numel() ** -0.5
    return gain * torch.randn(shape, generator=generator)


def write_public_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], contents: Mapping[str, Any], generator: torch.Generator
) -> None:
    """Write what torch.save writes for `{**contents, "state_dict": tensors}`, one tensor in memory at a time.

    Tensors without values (on the device "meta") get random ones.
    """
    structure = io.BytesIO()
    _StructurePickler(structure, protocol=2).dump({**contents, "state_dict": dict(tensors)})
    writer = torch._C.PyTorchFileWriter(str(path))  # torch.save's own, which public files came from too
    writer.write_record("data.pkl", structure.getvalue(), structure.tell())
    for number, (name, tensor) in enumerate(tensors.items()):
        value = random_weight(name, tensor.shape, generator) if tensor.is_meta else tensor.contiguous()
        writer.write_record(f"data/{number}", value.untyped_storage(), value.nbytes)
    writer.write_end_of_file()


def compare(image_path: Path, video_path: Path, config: DictConfig | Mapping[str, Any]) -> Comparison:
    """Compare a checkpoint written after a step of training with the image file that training started from.

    Where a weight began, if it is not in the image file, its running average tells, which began there too.
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
    return Comparison(
        num_equal=len(before.keys() - trained) - len(changed),
        changed=changed,
        num_moved=len(trained) - len(unmoved),
        still=[name for name in unmoved if not _is_idle(name)],
        idle=[name for name in unmoved if _is_idle(name)],
    )


@dataclass(frozen=True)
class _Storage:
    """The values of a tensor, to be written as a record of their own."""

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
    """Name of each parameter of the video network -> how many numbers it holds, and whether it is trained."""
    params = to_container(config)["model"]["params"]
    with torch.device("meta"):
        unet = build(params["unet_config"], "model.params.unet_config")
    trainable = params.get("trainable")
    ParameterGroups(unet, {"temporal": True} if trainable is None else trainable).freeze_the_rest()
    return {name: (weight.numel(), weight.requires_grad) for name, weight in unet.named_parameters()}


def _schedule(params: Mapping[str, Any]) -> NoiseSchedule:
    words = ("timesteps", "linear_start", "linear_end", "parameterization")
    return NoiseSchedule(**{word: params[word] for word in words if word in params})


def _same(first: Tensor, second: Tensor | None) -> bool:
    """The same bits, so that not even zero and minus zero are alike; what is stored in bfloat16 is compared so."""
    if second is None or first.shape != second.shape or second.dtype not in (first.dtype, torch.bfloat16):
        return False
    first = first.to(second.dtype)
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second)))


def _is_idle(name: str) -> bool:
    before_attention = is_temporal(name) and ".transformer_blocks." in name and ".to_out." not in name
    return before_attention or any(f".conditioning.temporal.{told}.0." in name for told in ("fps", "known_level"))
