"""Which weights of the UNet are trained, at which learning rate, and which stay frozen."""

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

    def __str__(self) -> str:
        return f"{self.name} {self.num_parameters / 1e6:.1f} M ({len(self.parameters)} tensors)"


class ParameterGroups:
    """The parameters of a UNet by group: each in exactly one.

    trainable: group -> True (the base learning rate), a positive learning rate, or False. A group is one of `GROUPS` or
        a prefix of parameter names such as `output_blocks.11`, which takes precedence; the longest prefix wins.
        `temporal` are the temporal layers, `spatial_attention` the rest of the transformers, `time_embed` the
        embedding of the diffusion step, `convolutions` all other parameters.

    Raises `UserError` for a group without parameters, unless it is one of `GROUPS` set to False, and when nothing is
    trained.
    """

    def __init__(self, unet: nn.Module, trainable: Mapping[str, bool | float]) -> None:
        _check_rates(trainable)
        transformers = tuple(f"{name}." for name, part in unet.named_modules() if isinstance(part, SpatialTransformer))
        prefixes = sorted((name for name in trainable if name not in GROUPS), key=len, reverse=True)

        def group_of(name: str) -> str:
            for prefix in prefixes:
                if name == prefix or name.startswith(prefix.rstrip(".") + "."):
                    return prefix
            if is_temporal(name):
                return "temporal"
            if name.startswith(transformers):
                return "spatial_attention"
            return "time_embed" if name.startswith("time_embed.") else "convolutions"

        members: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in (*GROUPS, *prefixes)}
        for name, parameter in unet.named_parameters():
            members[group_of(name)].append((name, parameter))
        for name, rate in trainable.items():
            if not members[name] and not (rate is False and name in GROUPS):
                near = difflib.get_close_matches(name, GROUPS, n=1) or ["temporal"]
                raise UserError(
                    f"model.params.trainable.{name}: expected one of {', '.join(GROUPS)} or a prefix of parameter "
                    f"names, found one that no parameter has; did you mean '{near[0]}'?"
                )
        groups = (Group(name, trainable.get(name, False), tuple(found)) for name, found in members.items() if found)
        self.groups = list(groups)
        if not self.trained:
            raise UserError("model.params.trainable: expected at least one group that is trained, found none")

    @property
    def trained(self) -> list[Group]:
        return [group for group in self.groups if group.is_trained]

    @property
    def is_temporal_only(self) -> bool:
        """True if every trained parameter belongs to a temporal layer."""
        return all(is_temporal(name) for group in self.trained for name, _ in group.parameters)

    def freeze_the_rest(self) -> None:
        """Set `requires_grad` of every parameter to whether its group is trained."""
        for group in self.groups:
            for _, parameter in group.parameters:
                parameter.requires_grad_(group.is_trained)

    def for_optimizer(self, base_rate: float) -> list[dict[str, Any]]:
        """The trained groups as optimiser groups: `name`, `params`, `lr`."""
        return [
            {
                "name": group.name,
                "params": [parameter for _, parameter in group.parameters],
                "lr": group.learning_rate(base_rate),
            }
            for group in self.trained
        ]

    def summary(self, base_rate: float) -> str:
        """One line: frozen and trained groups, their sizes and learning rates."""
        trained = [f"{group} at {group.learning_rate(base_rate):g}" for group in self.trained]
        frozen = [str(group) for group in self.groups if not group.is_trained]
        total = sum(group.num_parameters for group in self.groups)
        moving = sum(group.num_parameters for group in self.trained)
        return (
            f"frozen: {', '.join(frozen) or 'nothing'}; trained: {', '.join(trained)}; {moving / 1e6:.1f} M of "
            f"{total / 1e6:.1f} M parameters are trained"
        )


def _check_rates(trainable: Mapping[str, bool | float]) -> None:
    for name, rate in trainable.items():
        if not isinstance(rate, bool) and (not isinstance(rate, int | float) or rate <= 0):
            raise UserError(
                f"model.params.trainable.{name}: expected true, false or a learning rate above zero, found {rate!r}"
            )
