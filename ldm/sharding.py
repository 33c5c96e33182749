"""Tensors of a run of many processes: means over all of them, and weights of which each process keeps a part.

Parts are those of FSDP2 (Zhao et al. 2023, "PyTorch FSDP", and torch.distributed.fsdp.fully_shard): a weight is a
DTensor divided along its first dimension, and whole only while its block computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def num_processes() -> int:
    """How many processes train together; 1 outside of such a run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of all processes' values, in every one of them; the host does not wait for a card."""
    if num_processes() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / num_processes()


def shard_trained(network: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Divide the trained weights of a network among the processes of a mesh; what is frozen stays whole in each.

    blocks: parts of the network that are called as modules; each is gathered when it computes, what is in none of them
        when the network does.
    """
    for weight in network.parameters():
        if weight.requires_grad:
            weight.data = weight.data.contiguous()  # parts of another order in memory cannot be joined
    frozen = {weight for weight in network.parameters() if not weight.requires_grad}
    for block in blocks:
        if any(weight.requires_grad for weight in block.parameters()):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)
    # Weights may change between two forward passes without a backward pass: nothing whole may be left over.
    fully_shard(network, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard_trained` has been here: every process must take part wherever the network computes."""
    return isinstance(network, FSDPModule)


def is_shard(tensor: Tensor) -> bool:
    """Whether this process has but a part of the tensor."""
    return isinstance(tensor, DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """What this process has of a divided tensor, in the same memory; any other tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Divided as `like` is, on its device; nothing is sent: each process has all of `full`."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def from_local_shard(part: Tensor, like: Tensor) -> Tensor:
    """The reverse of `local_shard`: the divided tensor of which every process has such a part."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part.to(like.device), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def gather_full(tensor: Tensor) -> Tensor:
    """All of a divided tensor, in host memory; any other is returned as it is. All processes must ask for it."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Every process but the last ones has as many rows; those are filled up, and the surplus is cut off at the end.
    group, part = tensor.device_mesh.get_group(), tensor.detach().to_local()
    rows = -(-tensor.shape[0] // group.size())
    padded = part.new_zeros(rows, *tensor.shape[1:])
    padded[: len(part)] = part
    full = part.new_empty(rows * group.size(), *tensor.shape[1:])
    dist.all_gather(list(full.chunk(group.size())), padded, group=group)
    surplus = len(full) > len(tensor)
    return (full[: len(tensor)].clone() if surplus else full).cpu()
