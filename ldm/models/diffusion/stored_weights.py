"""Weights in bfloat16 that are trained as if they were float32: rounded at random, or with the lost bits kept beside.

bfloat16 is the upper half of a float32. An update smaller than half of its last place is lost when rounded to the
nearest; rounded up or down at random, in proportion, it is there on average (Gupta et al. 2015, "Deep Learning with
Limited Numerical Precision"). With the 16 lower bits in a tensor of integers nothing is lost at all, and the network
still reads 2 bytes a weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.models.diffusion.seeds import mixed

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
        generator.manual_seed(mixed(self.seed, ROUNDING_STREAM + self._places[weight], step))
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
