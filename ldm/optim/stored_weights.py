"""Weights in bfloat16 that are trained as if they were float32: rounded at random, or with the lost bits kept beside.

bfloat16 is the upper half of a float32. An update smaller than half of its last place is lost when rounded to the
nearest; rounded up or down at random, in proportion, it is there on average (Gupta et al. 2015, "Deep Learning with
Limited Numerical Precision"). With the 16 lower bits in a tensor of integers nothing is lost at all, and the network
still reads 2 bytes a weight.
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
NAN = 0x7FC00000  # one whose upper half is one as well


def rounded_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, up or down with the odds that make it right on average; same shape. NaN and infinity stay.

    `generator`: on the device of the values.
    """
    noise = torch.randint(LOW, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    raised = noise.add_(values.view(torch.int32)).bitwise_and_(-LOW).view(torch.float32)
    return torch.where(values.isfinite(), raised, values).to(torch.bfloat16)


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> the nearest bfloat16, and as int16 what is missing to the float32, in units of its last place.

    A value midway between two goes to the larger in magnitude, where a plain cast would look for the even one: with
    16 bits either way can be undone, but not both. Every NaN becomes the same one.
    """
    bits = torch.where(values.isnan(), NAN, values.view(torch.int32))
    upper = (bits + LOW // 2) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def joined(upper: Tensor, lower: Tensor) -> Tensor:
    """The float32 values that `split` took apart, bit by bit."""
    return ((upper.view(torch.int16).to(torch.int32) << 16) + lower).view(torch.float32)


class StoredWeights(nn.Module):
    """Puts a network's weights into the form they are kept in, and gives and takes them in float32.

    network: its parameters are changed in place. Vectors, that is biases and norms, stay float32: they are one weight
        in two thousand.
    trained, frozen: `weights` and `frozen` of `MemorySwitches`.
    seed: with a weight's place and the step it fixes how the weight is rounded.

    The lower bits are buffers, so that they follow the network to its device, and are in no state dict.
    """

    def __init__(self, network: nn.Module, trained: str = "float32", frozen: str = "float32", seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self._places: dict[nn.Parameter, int] = {}
        self._names: dict[str, nn.Parameter] = {}
        self._is_split = trained == "split"
        for place, (name, weight) in enumerate(network.named_parameters()):
            kind = trained if weight.requires_grad else frozen
            if kind == "float32" or weight.ndim < 2:
                continue
            if kind == "split":
                weight.data, lower = split(weight.data)
                self.register_buffer(f"lower{place}", lower, persistent=False)
            else:
                weight.data = weight.data.to(torch.bfloat16)
            if weight.requires_grad:
                self._places[weight] = place
                self._names[name] = weight

    def is_halved(self, weight: nn.Parameter) -> bool:
        """Whether a trained weight is kept in bfloat16, with or without its lower bits."""
        return weight in self._places

    @property
    def num_bytes(self) -> int:
        """Bytes of the lower bits."""
        return sum(lower.nbytes for lower in self.buffers())

    @torch.no_grad()
    def full(self, weight: nn.Parameter) -> Tensor:
        """The weight in float32: itself if it is kept so, else a copy."""
        if not self.is_halved(weight):
            return weight.detach().float()
        lower = self._lower(weight)
        return weight.detach().float() if lower is None else joined(weight.detach(), lower)

    @torch.no_grad()
    def put(self, weight: nn.Parameter, values: Tensor, step: int) -> None:
        """Store float32 values in the place of a halved weight; rounding draws belong to the weight and the step."""
        lower = self._lower(weight)
        if lower is not None:
            upper, new_lower = split(values)
            weight.copy_(upper)
            lower.copy_(new_lower)
            return
        generator = torch.Generator(weight.device)
        generator.manual_seed(mix_seed(self.seed, ROUNDING_STREAM + self._places[weight], step))
        weight.copy_(rounded_at_random(values, generator))

    def in_full(self, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """A state dict whose split weights, named with `prefix`, are their float32 values; these lie in host memory."""
        whole = dict(tensors)
        for name, weight in self._names.items():
            lower = self._lower(weight)
            if lower is not None and prefix + name in whole:
                whole[prefix + name] = joined(whole[prefix + name].detach().cpu(), lower.cpu())
        return whole

    def taken_apart(self, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """The reverse: keeps the lower bits of a state dict's split weights and returns it with the upper halves."""
        halves = dict(tensors)
        for name, weight in self._names.items():
            lower = self._lower(weight)
            if lower is not None and prefix + name in halves:
                halves[prefix + name], new_lower = split(halves[prefix + name].float())
                lower.copy_(new_lower)
        return halves

    def _lower(self, weight: nn.Parameter) -> Tensor | None:
        return self._buffers[f"lower{self._places[weight]}"] if self._is_split else None


PLACE = "model.params.memory"
STORED_AS = {"weights": ("float32", "bfloat16", "split"), "frozen": ("float32", "bfloat16")}


@dataclass(frozen=True)
class MemorySwitches:
    """How the network's weights lie in memory, and when they are updated.

    weights: of the trained ones. "bfloat16", rounded at random after each step, so that what is lost is right on
        average; "split": bfloat16 for the network and the 16 low bits beside it, together the exact float32 weight.
    frozen: of the others.
    step_in_backward: each weight is updated as soon as its gradient is there, and the gradient dropped.
    """

    weights: str = "float32"
    frozen: str = "float32"
    step_in_backward: bool = False

    @classmethod
    def of_config(cls, words: object) -> MemorySwitches:
        """The switches that `model.params.memory` sets; None: none of them. Raises `UserError`."""
        words = {} if words is None else words
        known = [field.name for field in fields(cls)]
        if not hasattr(words, "items") or (strangers := [word for word in words if word not in known]):
            found = words if not hasattr(words, "items") else strangers[0]
            raise UserError(f"{PLACE}: expected the words {', '.join(known)}, found {found!r}")
        switches = cls(**words)
        for name, accepted in STORED_AS.items():
            if (found := getattr(switches, name)) not in accepted:
                raise UserError(f"{PLACE}.{name}: expected one of {', '.join(accepted)}, found {found!r}")
        if not isinstance(switches.step_in_backward, bool):
            raise UserError(f"{PLACE}.step_in_backward: expected true or false, found {switches.step_in_backward!r}")
        return switches

    def check_run(self, precision: str, accumulate: int, clip: float | None, num_processes: int) -> None:
        """Raise `UserError` where a run's settings exclude a switch.

        precision, accumulate, clip: `precision`, `accumulate_grad_batches` and `gradient_clip_val` of Lightning's
            Trainer; clip is None or 0 for none.
        """
        for name in STORED_AS:
            if getattr(self, name) != "float32" and precision != "bf16-mixed":
                raise UserError(
                    f"{PLACE}.{name}: {getattr(self, name)} needs lightning.trainer.precision: bf16-mixed, found "
                    f"{precision}; set that precision, or {name}: float32"
                )
        if not self.step_in_backward:
            return
        if accumulate != 1:
            raise UserError(
                f"{PLACE}.step_in_backward: expected lightning.trainer.accumulate_grad_batches: 1, found {accumulate}: "
                "a gradient that is dropped at once cannot be summed up over batches; set one of the two back"
            )
        if clip:
            raise UserError(
                f"{PLACE}.step_in_backward: expected lightning.trainer.gradient_clip_val: null, found {clip:g}: "
                "weights are updated before the norm of all gradients is known; set one of the two back"
            )
        if precision == "16-mixed":
            raise UserError(
                f"{PLACE}.step_in_backward: expected lightning.trainer.precision bf16-mixed or 32-true, found "
                "16-mixed, whose gradients are scaled until the backward pass is over"
            )
        if num_processes != 1:
            raise UserError(
                f"{PLACE}.step_in_backward: expected one device, found {num_processes}: weights are updated before the "
                "gradients of all devices are summed up; train on one, or set it to false"
            )

    def check_parts(self, where: str, optimizer: Mapping[str, object]) -> None:
        """Raise `UserError` where weights that are divided among processes exclude a switch or an optimiser's option.

        where: what divides them, for the message.  optimizer: options of `build_optimizer`.
        """
        found = {
            f"{PLACE}.weights": (self.weights, "float32"),
            f"{PLACE}.step_in_backward": (self.step_in_backward, False),
            "model.params.optimizer.name": (optimizer.get("name", "adamw"), "adamw"),
            "model.params.optimizer.states_on": (optimizer.get("states_on", "card"), "card"),
        }
        for name, (value, needed) in found.items():
            if value != needed:
                raise UserError(
                    f"{where} needs {name}: {_word(needed)}, found {_word(value)}: each process has a part of the "
                    "weights and updates it in float32, which takes less the more of them there are; set that, or ddp"
                )


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
