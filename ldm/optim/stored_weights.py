"""Weights in bfloat16, trained as float32: rounded stochastically, or with the lost bits stored beside them.

bfloat16 is the upper half of a float32. An update smaller than half of its last place is lost when rounded to nearest;
stochastic rounding keeps it on average (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision"). With the
16 lower bits in a tensor of integers nothing is lost, and the network still reads 2 bytes a weight. `MemorySwitches`
are the options of `model.params.memory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from ldm.diffusion.noise import mix_seed
from ldm.errors import UserError

ROUNDING_STREAM = 1000  # the first of the streams of random draws, one for each weight
LOW = 1 << 16  # numbers that 16 bits hold
NAN = 0x7FC00000  # a NaN whose upper half is NaN too


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16 of the same shape, up or down with unbiased odds. NaN and infinity stay.

    generator: on the device of the values.
    """
    noise = torch.randint(LOW, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    raised = noise.add_(values.view(torch.int32)).bitwise_and_(-LOW).view(torch.float32)
    return torch.where(values.isfinite(), raised, values).to(torch.bfloat16)


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> the nearest bfloat16, and as int16 the difference to the float32, in units of its last place.

    Ties round away from zero, not to even: both would fit into 16 bits, but only one can be undone. Every NaN becomes
    the same one.
    """
    bits = torch.where(values.isnan(), NAN, values.view(torch.int32))
    upper = (bits + LOW // 2) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def joined(upper: Tensor, lower: Tensor) -> Tensor:
    """The float32 values that `split` divided, bit by bit."""
    return ((upper.view(torch.int16).to(torch.int32) << 16) + lower).view(torch.float32)


class StoredWeights(nn.Module):
    """Converts a network's weights to their storage format, and reads and writes them in float32.

    network: its parameters are changed in place. Vectors (biases, norms) stay float32: one weight in two thousand.
    trained, frozen: `weights` and `frozen` of `MemorySwitches`.
    seed: with the weight's index and the step it fixes the stochastic rounding.

    The lower bits are buffers, so they follow the network to its device; they are in no state dict.
    """

    def __init__(self, network: nn.Module, trained: str = "float32", frozen: str = "float32", seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self._indices: dict[nn.Parameter, int] = {}
        self._names: dict[str, nn.Parameter] = {}
        self._is_split = trained == "split"
        for index, (name, weight) in enumerate(network.named_parameters()):
            kind = trained if weight.requires_grad else frozen
            if kind == "float32" or weight.ndim < 2:
                continue
            if kind == "split":
                weight.data, lower = split(weight.data)
                self.register_buffer(f"lower{index}", lower, persistent=False)
            else:
                weight.data = weight.data.to(torch.bfloat16)
            if weight.requires_grad:
                self._indices[weight] = index
                self._names[name] = weight

    def is_halved(self, weight: nn.Parameter) -> bool:
        """Whether a trained weight is stored in bfloat16, with or without its lower bits."""
        return weight in self._indices

    @property
    def num_bytes(self) -> int:
        """Bytes of the lower bits."""
        return sum(lower.nbytes for lower in self.buffers())

    @torch.no_grad()
    def full(self, weight: nn.Parameter) -> Tensor:
        """The weight in float32: itself if it is stored so, otherwise a copy."""
        lower = self._lower(weight) if self.is_halved(weight) else None
        return weight.detach().float() if lower is None else joined(weight.detach(), lower)

    @torch.no_grad()
    def put(self, weight: nn.Parameter, values: Tensor, step: int) -> None:
        """Store float32 values in a halved weight; `step` selects the draws of stochastic rounding."""
        lower = self._lower(weight)
        if lower is not None:
            upper, new_lower = split(values)
            weight.copy_(upper)
            lower.copy_(new_lower)
            return
        generator = torch.Generator(weight.device)
        generator.manual_seed(mix_seed(self.seed, ROUNDING_STREAM + self._indices[weight], step))
        weight.copy_(round_stochastically(values, generator))

    def join_state(self, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """A state dict with split weights, named with `prefix`, as float32 values in host memory."""
        whole = dict(tensors)
        for name, weight in self._names.items():
            if self._is_split and prefix + name in whole:
                whole[prefix + name] = joined(whole[prefix + name].detach().cpu(), self._lower(weight).cpu())
        return whole

    def split_state(self, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """The reverse: store the lower bits of a state dict's split weights and return it with the upper halves."""
        halves = dict(tensors)
        for name, weight in self._names.items():
            if self._is_split and prefix + name in halves:
                halves[prefix + name], lower = split(halves[prefix + name].float())
                self._lower(weight).copy_(lower)
        return halves

    def _lower(self, weight: nn.Parameter) -> Tensor | None:
        return self._buffers[f"lower{self._indices[weight]}"] if self._is_split else None


OPTION = "model.params.memory"
STORED_AS = {"weights": ("float32", "bfloat16", "split"), "frozen": ("float32", "bfloat16")}


@dataclass(frozen=True)
class MemorySwitches:
    """How the network's weights are stored, and when they are updated.

    weights: the trained ones. "bfloat16": rounded stochastically after each step; "split": bfloat16 for the network and
        the 16 low bits beside it, together the exact float32 weight.
    frozen: the others.
    step_in_backward: update each weight as soon as its gradient is complete, and drop the gradient.
    """

    weights: str = "float32"
    frozen: str = "float32"
    step_in_backward: bool = False

    @classmethod
    def of_config(cls, options: object) -> MemorySwitches:
        """The switches that `model.params.memory` sets; None: all defaults. Raises `UserError`."""
        options = {} if options is None else options
        known = [field.name for field in fields(cls)]
        unknown = [key for key in options if key not in known] if hasattr(options, "items") else [options]
        if unknown:
            raise UserError(f"{OPTION}: expected the keys {', '.join(known)}, found {unknown[0]!r}")
        switches = cls(**options)
        for name, accepted in STORED_AS.items():
            if (found := getattr(switches, name)) not in accepted:
                raise UserError(f"{OPTION}.{name}: expected one of {', '.join(accepted)}, found {found!r}")
        if not isinstance(switches.step_in_backward, bool):
            raise UserError(f"{OPTION}.step_in_backward: expected true or false, found {switches.step_in_backward!r}")
        return switches

    def check_run(self, precision: str, accumulate: int, clip: float | None, num_processes: int) -> None:
        """Raise `UserError` where a run's settings exclude a switch.

        precision, accumulate, clip: `precision`, `accumulate_grad_batches` and `gradient_clip_val` of Lightning's
            Trainer; clip is None or 0 for none.
        """
        for name in STORED_AS:
            if getattr(self, name) != "float32" and precision != "bf16-mixed":
                raise UserError(
                    f"{OPTION}.{name}: {getattr(self, name)} needs lightning.trainer.precision: bf16-mixed, found "
                    f"{precision}; set that precision, or {name}: float32"
                )
        conflicts = {
            f"lightning.trainer.accumulate_grad_batches: 1, found {accumulate}: a dropped gradient cannot be summed "
            "over batches; set one of the two back": accumulate != 1,
            f"lightning.trainer.gradient_clip_val: null, found {clip or 0:g}: weights are updated before the norm of "
            "all gradients is known; set one of the two back": bool(clip),
            "lightning.trainer.precision bf16-mixed or 32-true, found 16-mixed, whose gradients are scaled until the "
            "backward pass ends": precision == "16-mixed",
            f"one device, found {num_processes}: weights are updated before the gradients of all devices are summed; "
            "train on one, or set it to false": num_processes != 1,
        }
        for message, is_conflict in conflicts.items():
            if self.step_in_backward and is_conflict:
                raise UserError(f"{OPTION}.step_in_backward: expected {message}")

    def check_parts(self, where: str, optimizer: Mapping[str, object]) -> None:
        """Raise `UserError` where weights sharded over processes exclude a switch or an option of the optimiser.

        where: the strategy, for the message.  optimizer: options of `build_optimizer`.
        """
        needed = {
            f"{OPTION}.weights": (self.weights, "float32"),
            f"{OPTION}.step_in_backward": (self.step_in_backward, False),
            "model.params.optimizer.name": (optimizer.get("name", "adamw"), "adamw"),
            "model.params.optimizer.states_on": ("host" if optimizer.get("states_on") == "host" else "gpu", "gpu"),
        }
        for name, (value, accepted) in needed.items():
            if value != accepted:
                shown = [str(one).lower() if isinstance(one, bool) else one for one in (accepted, value)]
                raise UserError(
                    f"{where} needs {name}: {shown[0]}, found {shown[1]}: each process updates its part of the weights "
                    "in float32, which takes less memory the more processes there are; set that, or ddp"
                )
