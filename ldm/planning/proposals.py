"""The gentlest switches that make a training step fit, from free ones to those that change its numbers.

The order is that of `SWITCHES`. As few of the first ones as necessary are chosen; then those that turn out to be
unnecessary are removed again, the most expensive first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from ldm.config import to_container
from ldm.errors import UserError
from ldm.optim import check_options
from ldm.optim.stored_weights import MemorySwitches
from ldm.planning.count import ALLOWANCE, GIB, StepCount

UNET, MEMORY = "model.params.unet_config.params", "model.params.memory"
OPTIMIZER, TRAINER = "model.params.optimizer", "lightning.trainer"

# Values of a switch, by decreasing memory.
ORDERS = {
    f"{OPTIMIZER}.name": ("adamw", "adamw8bit", "adamw4bit"),
    f"{MEMORY}.weights": ("float32", "split", "bfloat16"),
}


@dataclass(frozen=True)
class Switch:
    """Overrides, a description of their cost, and whether they are free."""

    overrides: tuple[tuple[str, Any], ...]
    cost: str
    is_free: bool = False


SWITCHES = (
    Switch(((f"{OPTIMIZER}.name", "adamw8bit"),), "no time; states rounded to 8 bits", True),
    Switch(((f"{MEMORY}.frozen", "bfloat16"),), "nothing: autocast rounds them so anyway", True),
    Switch((("lightning.callbacks.average.params.device", "cpu"),), "nothing: copied beside the next step", True),
    Switch(((f"{UNET}.use_checkpoint", True),), "a third more work, same numbers"),
    Switch(((f"{UNET}.feed_forward_frames", 1),), "a few percent more work, same numbers"),
    Switch(((f"{MEMORY}.weights", "split"),), "a little time, same numbers"),
    Switch(((f"{UNET}.inputs_on_host", True),), "time where the copies are slower than the blocks, same numbers"),
    Switch(((f"{OPTIMIZER}.states_on", "host"),), "time for copies in each step, same numbers"),
    Switch(
        ((f"{MEMORY}.step_in_backward", True), (f"{TRAINER}.gradient_clip_val", None)),
        "no clipping of gradients by their norm",
    ),
    Switch(((f"{MEMORY}.weights", "bfloat16"),), "weights rounded stochastically to 8 bits of precision"),
    Switch(((f"{OPTIMIZER}.name", "adamw4bit"),), "states rounded to 4 bits"),
)  # fmt: skip


@dataclass(frozen=True)
class Proposal:
    """Switches that make the step fit, and its count with them."""

    switches: list[Switch]
    count: StepCount

    @property
    def overrides(self) -> list[tuple[str, Any]]:
        """Keys and values, the last value of each key."""
        return list(dict(pair for switch in self.switches for pair in switch.overrides).items())


def needed(count: StepCount) -> float:
    """GiB of GPU memory that a step needs, with `ALLOWANCE`."""
    return (count.peak.total + ALLOWANCE[1]) / GIB


def with_switches(config: Mapping[str, Any], switches: Sequence[Switch]) -> dict[str, Any]:
    """The config with these switches set."""
    changed = OmegaConf.create(to_container(config))
    for switch in switches:
        for key, value in switch.overrides:
            OmegaConf.update(changed, key, value, force_add=True)
    return to_container(changed)


def check_switches(config: Mapping[str, Any]) -> None:
    """Raise `UserError` for switches that exclude each other or an option of the run."""
    params, trainer = config["model"].get("params") or {}, (config.get("lightning") or {}).get("trainer") or {}
    check_options(params.get("optimizer") or {})
    MemorySwitches.of_config(params.get("memory")).check_run(
        str(trainer.get("precision") or "32-true"),
        trainer.get("accumulate_grad_batches") or 1,
        trainer.get("gradient_clip_val"),
        1,
    )


def propose(config: Mapping[str, Any], vram: float, count: Callable[[dict[str, Any]], StepCount]) -> Proposal:
    """The gentlest switches with which a step fits into `vram` GiB. Raises `UserError` if none do, with the minimum."""
    switches = _available(config)
    found: dict[int, StepCount] = {}

    def fits(num: int) -> bool:
        found[num] = count(with_switches(config, switches[:num]))
        return needed(found[num]) <= vram

    if not fits(len(switches)):
        least = found[len(switches)]
        raise UserError(
            f"--vram {vram:g}: nothing fits: with every switch a step of {least.shape} still needs "
            f"{needed(least):.1f} GiB, {least.peak.total / GIB:.1f} of them tensors; the smallest GPU that fits has "
            f"{-int(-needed(least) // 1)} GB. Lower data.params.batch_size or data.params.frames, or train less "
            "(model.params.trainable)"
        )
    too_few, enough = 0, len(switches)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if fits(middle) else (middle, enough)
    chosen, best = switches[:enough], found[enough]
    for switch in [switch for switch in chosen[-2::-1] if not switch.is_free]:
        fewer = [other for other in chosen if other is not switch]
        changed = with_switches(config, fewer)
        try:  # some switches depend on the one that was removed
            check_switches(changed)
            without = count(changed)
        except UserError:
            continue
        if needed(without) <= vram:
            chosen, best = fewer, without
    return Proposal(chosen, best)


def _available(config: Mapping[str, Any]) -> list[Switch]:
    """The switches that change something here and that the run's options allow."""
    switches: list[Switch] = []
    has_average = bool(((config.get("lightning") or {}).get("callbacks") or {}).get("average"))
    for switch in SWITCHES:
        before, changed = with_switches(config, switches), with_switches(config, [*switches, switch])
        is_for_average = any("average" in key for key, _ in switch.overrides)
        if changed == before or _needs_more(config, switch) or (is_for_average and not has_average):
            continue
        try:
            check_switches(changed)
        except UserError:
            continue
        switches.append(switch)
    return switches


def _needs_more(config: Mapping[str, Any], switch: Switch) -> bool:
    """Whether it would set a value that needs as much memory as the config's own, or more."""
    tree = OmegaConf.create(to_container(config))
    for key, value in switch.overrides:
        order, given = ORDERS.get(key, ()), OmegaConf.select(tree, key)
        if given in order and order.index(given) >= order.index(value):
            return True
    return False
