"""Which switches make a training step fit: the gentlest that do, from those that cost nothing to those that change it.

The order is that of `LADDER`. Of the rungs from the first on, as few are taken as are needed; of these, those that turn
out not to be needed are left out again, the costliest first.
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
from ldm.planning.count import ALLOWANCE, GIB, Count

UNET, MEMORY = "model.params.unet_config.params", "model.params.memory"
OPTIMIZER, TRAINER = "model.params.optimizer", "lightning.trainer"

# Values of a switch from the one that takes most room on.
ORDERS = {
    f"{OPTIMIZER}.name": ("adamw", "adamw8bit", "adamw4bit"),
    f"{MEMORY}.weights": ("float32", "split", "bfloat16"),
}


@dataclass(frozen=True)
class Rung:
    """A switch: what it sets, what it costs in words, and whether it costs anything at all."""

    overrides: tuple[tuple[str, Any], ...]
    cost: str
    is_free: bool = False


LADDER = (
    Rung(((f"{OPTIMIZER}.name", "adamw8bit"),), "no time; states rounded to 8 bits", True),
    Rung(((f"{MEMORY}.frozen", "bfloat16"),), "nothing: autocast rounds them so anyway", True),
    Rung((("lightning.callbacks.average.params.device", "cpu"),), "nothing: copied beside the next step", True),
    Rung(((f"{UNET}.use_checkpoint", True),), "a third more work, same numbers"),
    Rung(((f"{UNET}.feed_forward_frames", 1),), "a few percent more work, same numbers"),
    Rung(((f"{MEMORY}.weights", "split"),), "a little time, same numbers"),
    Rung(((f"{UNET}.inputs_on_host", True),), "time where the copies are slower than the blocks, same numbers"),
    Rung(((f"{OPTIMIZER}.states_on", "host"),), "time for copies in each step, same numbers"),
    Rung(
        ((f"{MEMORY}.step_in_backward", True), (f"{TRAINER}.gradient_clip_val", None)),
        "no clipping of gradients by their norm",
    ),
    Rung(((f"{MEMORY}.weights", "bfloat16"),), "weights rounded at random to 8 bits of precision"),
    Rung(((f"{OPTIMIZER}.name", "adamw4bit"),), "states rounded to 4 bits"),
)  # fmt: skip


@dataclass(frozen=True)
class Proposal:
    """Rungs that make the step fit, the config with them, and its count."""

    rungs: list[Rung]
    config: dict[str, Any]
    count: Count

    @property
    def overrides(self) -> list[tuple[str, Any]]:
        """What to set, the last word for each key."""
        return list(dict(pair for rung in self.rungs for pair in rung.overrides).items())


def needed(count: Count) -> float:
    """GiB that a card must have for a step, with what is not tensors."""
    return (count.peak.total + ALLOWANCE[1]) / GIB


def with_rungs(config: Mapping[str, Any], rungs: Sequence[Rung]) -> dict[str, Any]:
    """The config with what these rungs set."""
    changed = OmegaConf.create(to_container(config))
    for rung in rungs:
        for key, value in rung.overrides:
            OmegaConf.update(changed, key, value, force_add=True)
    return to_container(changed)


def check_switches(config: Mapping[str, Any]) -> None:
    """Raise `UserError` for switches that exclude each other or a setting of the run."""
    params, trainer = config["model"].get("params") or {}, (config.get("lightning") or {}).get("trainer") or {}
    check_options(params.get("optimizer") or {})
    MemorySwitches.of_config(params.get("memory")).check_run(
        str(trainer.get("precision") or "32-true"),
        trainer.get("accumulate_grad_batches") or 1,
        trainer.get("gradient_clip_val"),
        1,
    )


def propose(config: Mapping[str, Any], vram: float, count: Callable[[dict[str, Any]], Count]) -> Proposal:
    """The gentlest rungs with which a step fits into `vram` GiB. Raises `UserError` if none do, with the least."""
    rungs = _open_rungs(config)
    found: dict[int, Count] = {}

    def fits(num: int) -> bool:
        found[num] = count(with_rungs(config, rungs[:num]))
        return needed(found[num]) <= vram

    if not fits(len(rungs)):
        least = found[len(rungs)]
        raise UserError(
            f"--vram {vram:g}: nothing fits: with every switch a step of {least.shape} still needs "
            f"{needed(least):.1f} GiB, {least.peak.total / GIB:.1f} of them tensors; the least card that would do has "
            f"{-int(-needed(least) // 1)} GB. Lower data.params.batch_size or data.params.frames, or train less "
            "(model.params.trainable)"
        )
    too_few, enough = 0, len(rungs)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if fits(middle) else (middle, enough)
    chosen, best = rungs[:enough], found[enough]
    for rung in [rung for rung in chosen[-2::-1] if not rung.is_free]:
        fewer = [other for other in chosen if other is not rung]
        without = _count_if_allowed(config, fewer, count)
        if without is not None and needed(without) <= vram:
            chosen, best = fewer, without
    return Proposal(chosen, with_rungs(config, chosen), best)


def _open_rungs(config: Mapping[str, Any]) -> list[Rung]:
    """Those that change something here and that the run's settings allow."""
    rungs: list[Rung] = []
    for rung in LADDER:
        changed = with_rungs(config, [*rungs, rung])
        has_average = ((config.get("lightning") or {}).get("callbacks") or {}).get("average")
        is_for_average = any("average" in key for key, _ in rung.overrides)
        if changed == with_rungs(config, rungs) or _goes_back(config, rung) or (is_for_average and not has_average):
            continue
        if _is_allowed(changed):
            rungs.append(rung)
    return rungs


def _goes_back(config: Mapping[str, Any], rung: Rung) -> bool:
    """Whether it would set something to a value that takes more room than the config's own."""
    tree = OmegaConf.create(to_container(config))
    for key, value in rung.overrides:
        order, given = ORDERS.get(key, ()), OmegaConf.select(tree, key)
        if given in order and order.index(given) >= order.index(value):
            return True
    return False


def _is_allowed(config: Mapping[str, Any]) -> bool:
    try:
        check_switches(config)
    except UserError:
        return False
    return True


def _count_if_allowed(
    config: Mapping[str, Any], rungs: Sequence[Rung], count: Callable[[dict[str, Any]], Count]
) -> Count | None:
    """None where the rungs cannot be without one that was left out."""
    changed = with_rungs(config, rungs)
    if not _is_allowed(changed):
        return None
    try:
        return count(changed)
    except UserError:
        return None
