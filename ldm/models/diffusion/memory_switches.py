"""The switches of `model.params.memory`: what is stored in half the bytes, and what is not stored at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from ldm.errors import UserError

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
