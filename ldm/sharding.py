"""Tensors of a run on many processes: means over processes, and weights sharded by FSDP2.

A sharded weight is a DTensor divided along its first dimension, gathered only while its block computes (Zhao et al.
2023, "PyTorch FSDP", and torch.distributed.fsdp.fully_shard).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def num_processes() -> int:
    """Number of processes that train together; 1 outside of a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean over all processes, on each of them; the host does not wait for the GPU."""
    if num_processes() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / num_processes()


def shard_trained(network: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Shard the trained weights of a network over a mesh; frozen weights stay whole on every process.

    blocks: submodules that are called as modules; each is gathered when it runs, the remaining weights when the network
        does.
    """
    for weight in network.parameters():
        if weight.requires_grad:
            weight.data = weight.data.contiguous()  # shards with other strides cannot be concatenated
    frozen = {weight for weight in network.parameters() if not weight.requires_grad}
    for block in blocks:
        if any(weight.requires_grad for weight in block.parameters()):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)
    # Weights may change between two forward passes without a backward pass, so none may stay gathered.
    fully_shard(network, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard_trained` was applied; then every process must take part in each call of the network."""
    return isinstance(network, FSDPModule)


def is_shard(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor."""
    return isinstance(tensor, DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; other tensors are returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """`full`, which every process holds, sharded as `like` is and on its device, without communication."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def from_local_shard(part: Tensor, like: Tensor) -> Tensor:
    """The sharded tensor whose part on this process is `part`: the reverse of `local_shard`."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part.to(like.device), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def gather_full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, in host memory; others are returned unchanged. Every process must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    # All processes but the last ones hold equally many rows: pad the others, and cut the surplus off at the end.
    group, part = tensor.device_mesh.get_group(), tensor.detach().to_local()
    rows = -(-tensor.shape[0] // group.size())
    padded = part.new_zeros(rows, *tensor.shape[1:])
    padded[: len(part)] = part
    full = part.new_empty(rows * group.size(), *tensor.shape[1:])
    dist.all_gather(list(full.chunk(group.size())), padded, group=group)
    surplus = len(full) > len(tensor)
    return (full[: len(tensor)].clone() if surplus else full).cpu()
