"""Which weights of the UNet are trained, at which learning rate, and which stay as they are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ldm.errors import UserError
from ldm.modules.attention import SpatialTransformer
from ldm.modules.temporal import is_temporal

GROUPS = ("temporal", "spatial_attention", "time_embed", "convolutions")


@dataclass(frozen=True)
class Group:
    """Parameters that share a name in the config. `rate`: True, False or a learning rate of their own."""

    name: str
    rate: bool | float
    parameters: tuple[tuple[str, nn.Parameter], ...]

    @property
    def is_trained(self) -> bool:
        return self.rate is not False

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for _, parameter in self.parameters)

    def learning_rate(self, base: float) -> float:
        return base if self.rate is True else float(self.rate)


class ParameterGroups:
    """The parameters of a UNet by group: each in exactly one.

    trainable: group -> True (the base learning rate), a positive learning rate, or False. A group is one of `GROUPS` or
        the beginning of a parameter's name such as `output_blocks.11`, which then goes first; the longest wins.
        `temporal` are the layers over time, `spatial_attention` the rest of the transformers, `time_embed` the
        embedding of the diffusion step, `convolutions` all else.

    Raises `UserError` for a group that has no parameter, unless it is one of `GROUPS` and not to be trained, and when
    nothing is trained.
    """

    def __init__(self, unet: nn.Module, trainable: Mapping[str, bool | float]) -> None:
        _check_rates(trainable)
        transformers = tuple(f"{name}." for name, part in unet.named_modules() if isinstance(part, SpatialTransformer))
        own_names = sorted((name for name in trainable if name not in GROUPS), key=len, reverse=True)

        def group_of(name: str) -> str:
            for own in own_names:
                if name == own or name.startswith(own.rstrip(".") + "."):
                    return own
            if is_temporal(name):
                return "temporal"
            if name.startswith(transformers):
                return "spatial_attention"
            return "time_embed" if name.startswith("time_embed.") else "convolutions"

        members: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in (*GROUPS, *own_names)}
        for name, parameter in unet.named_parameters():
            members[group_of(name)].append((name, parameter))
        for name, rate in trainable.items():
            if not members[name] and not (rate is False and name in GROUPS):
                near = difflib.get_close_matches(name, GROUPS, n=1) or ["temporal"]
                raise UserError(
                    f"model.params.trainable.{name}: expected one of {', '.join(GROUPS)} or the beginning of a "
                    f"parameter's name, found one that no parameter has; did you mean '{near[0]}'?"
                )
        self.groups = [
            Group(name, trainable.get(name, False), tuple(parameters))
            for name, parameters in members.items()
            if parameters
        ]
        if not any(group.is_trained for group in self.groups):
            raise UserError("model.params.trainable: expected at least one group that is trained, found none")

    @property
    def is_temporal_alone(self) -> bool:
        """True if every trained parameter belongs to a layer over time."""
        return all(is_temporal(name) for group in self.groups if group.is_trained for name, _ in group.parameters)

    def freeze_the_rest(self) -> None:
        """Set `requires_grad` of every parameter to whether its group is trained."""
        for group in self.groups:
            for _, parameter in group.parameters:
                parameter.requires_grad_(group.is_trained)

    def for_optimizer(self, base_rate: float) -> list[dict[str, Any]]:
        """The trained groups as an optimiser takes them: `name`, `params`, `lr`."""
        return [
            {
                "name": group.name,
                "params": [parameter for _, parameter in group.parameters],
                "lr": group.learning_rate(base_rate),
            }
            for group in self.groups
            if group.is_trained
        ]

    def summary(self, base_rate: float) -> str:
        """One line that says what is frozen and what is trained."""
        trained = [
            f"{_count(group)} at {group.learning_rate(base_rate):g}" for group in self.groups if group.is_trained
        ]
        frozen = [_count(group) for group in self.groups if not group.is_trained]
        total = sum(group.num_parameters for group in self.groups)
        moving = sum(group.num_parameters for group in self.groups if group.is_trained)
        return (
            f"frozen: {', '.join(frozen) or 'nothing'}; trained: {', '.join(trained)}; {moving / 1e6:.1f} M of "
            f"{total / 1e6:.1f} M parameters are trained"
        )


def _count(group: Group) -> str:
    return f"{group.name} {group.num_parameters / 1e6:.1f} M ({len(group.parameters)} tensors)"


def _check_rates(trainable: Mapping[str, bool | float]) -> None:
    for name, rate in trainable.items():
        if not isinstance(rate, bool) and (not isinstance(rate, int | float) or rate <= 0):
            raise UserError(
                f"model.params.trainable.{name}: expected true, false or a learning rate above zero, found {rate!r}"
            )
