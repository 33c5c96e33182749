"""Which launcher started this process, and how many processes there are: torchrun, srun, Lightning, or none.

On one machine `--devices 8` starts all of them. On several machines torchrun or srun starts every process, or `python
main.py` is started once on each with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning_fabric.plugins.environments import SLURMEnvironment

from ldm.errors import UserError

PATIENCE = timedelta(minutes=10)  # for the processes of all machines to connect
_stores: list[dist.Store] = []  # kept open: Lightning uses the same address afterwards


@dataclass(frozen=True)
class Launch:
    """Processes started by torchrun or srun (`starter`); rank: of this process."""

    starter: str
    rank: int
    world_size: int
    per_node: int

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.per_node


def find_launch() -> Launch | None:
    """The launch that this process is part of; None for a single process and for processes that Lightning starts."""
    if dist.is_available() and dist.is_torchelastic_launched():
        rank, world_size, per_node = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        return Launch("torchrun", rank, world_size, per_node)
    if not SLURMEnvironment.detect() or int(os.environ["SLURM_NTASKS"]) == 1:
        return None
    world_size = int(os.environ["SLURM_NTASKS"])
    if "SLURM_STEP_ID" not in os.environ:
        raise UserError(
            f"SLURM: expected {world_size} processes of this command, started by srun, found one without srun; put "
            "srun before python"
        )
    if "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(
            f"SLURM: expected --ntasks-per-node with --nodes, found --ntasks {world_size} alone; give the number "
            "of processes per machine, one for each GPU"
        )
    return Launch("srun", int(os.environ["SLURM_PROCID"]), world_size, int(os.environ["SLURM_NTASKS_PER_NODE"]))


def is_first_process() -> bool:
    """Whether this process logs, samples and writes; known before training starts."""
    launch = find_launch()
    if launch is not None:
        return launch.rank == 0
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK"))


def as_launched(arguments: Mapping[str, Any], on_one: int) -> dict[str, Any]:
    """Lightning's trainer arguments with the number of devices and nodes of the launch.

    on_one: devices per node that the arguments ask for; used only where they have "devices". Raises `UserError` where
        they differ from the launch.
    """
    launch = find_launch()
    if launch is None:
        return {"devices": 1, **arguments}
    started = {"devices": launch.per_node, "num_nodes": launch.num_nodes}
    asked = {"devices": on_one, "num_nodes": int(arguments.get("num_nodes", 1))}
    for name, number in started.items():
        if name in arguments and asked[name] != number:
            raise UserError(
                f"lightning.trainer.{name}: expected {number}, because {launch.starter} started {launch.world_size} "
                f"processes, {launch.per_node} on each of {launch.num_nodes} machines, found {asked[name]}; leave it "
                "out, or change the launch"
            )
    return {**started, **arguments}


def agree_on(value: str, num_nodes: int = 1) -> str:
    """The value of a run's first process, in every process started so far.

    num_nodes: machines on which `python main.py` was started by hand.
    """
    launch = find_launch()
    if launch is not None:
        rank, world_size = launch.rank, launch.world_size
        if launch.starter == "srun":
            meeting = SLURMEnvironment(auto_requeue=False)
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = meeting.main_address, str(meeting.main_port)
    elif num_nodes > 1 and "LOCAL_RANK" not in os.environ:
        rank, world_size = _node_rank(num_nodes), num_nodes
    else:
        return value
    if world_size == 1:
        return value
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=PATIENCE))
        if rank == 0:
            store.set("video-sd/value", value)
        _stores.append(store)
        return store.get("video-sd/value").decode()
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"MASTER_ADDR, MASTER_PORT: expected {world_size} processes to connect at {address}, found {error}; "
            "start all of them, with an address of the first that the others can reach"
        ) from error


def _node_rank(num_nodes: int) -> int:
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"--num_nodes {num_nodes}: expected NODE_RANK, MASTER_ADDR and MASTER_PORT in the environment of each "
            f"machine, found no {missing[0]}; set them, or use torchrun or srun (docs/scaling.md)"
        )
    return int(os.environ["NODE_RANK"])
