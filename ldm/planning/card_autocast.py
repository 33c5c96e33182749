"""Autocast as it acts on a graphics card, for tensors that only stand for ones there.

Fake tensors on the device "meta" are what a machine without a card can give; PyTorch's own autocast knows no such
device. Which operations run in which precision, and that casts of trained weights are kept until the outermost autocast
ends, is taken from PyTorch's documentation (torch.amp, "CUDA Ops that can autocast to ..."). Attention is given to the
fused kernel, as on a card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

IN_HALF = {
    F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, torch.conv1d, torch.conv2d,
    torch.conv3d, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, Tensor.matmul,
    Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm,
}  # fmt: skip
IN_FULL = {
    F.layer_norm, F.group_norm, F.mse_loss, torch.layer_norm, torch.group_norm, torch.exp, torch.log, torch.pow,
    torch.rsqrt, torch.norm, torch.cumsum, torch.cumprod, torch.prod, Tensor.exp, Tensor.log, Tensor.pow,
    Tensor.__pow__, Tensor.rsqrt, Tensor.norm, Tensor.cumsum, Tensor.cumprod, Tensor.prod,
}  # fmt: skip
# These too, unless they are told a precision.
IN_FULL_UNLESS_TOLD = {F.softmax, F.log_softmax, torch.softmax, torch.sum, Tensor.softmax, Tensor.sum}


class CardCasts(TorchFunctionMode):
    """Casts what autocast would cast on a card, as long as autocast is on."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def forget(self) -> None:
        """Let go of the casts of weights."""
        self._kept.clear()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu"):
            if func in IN_HALF:
                args, kwargs = tree_map_only(Tensor, self._to_half, (args, kwargs))
            elif func in IN_FULL or (func in IN_FULL_UNLESS_TOLD and kwargs.get("dtype") is None):
                args, kwargs = tree_map_only(Tensor, _to_full, (args, kwargs))
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _to_half(self, tensor: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu")
        if not tensor.is_meta or not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
            return tensor
        is_kept = tensor.is_leaf and tensor.requires_grad and tensor.dtype == torch.float32
        if not is_kept or not torch.is_autocast_cache_enabled():
            return tensor.to(dtype)
        if id(tensor) not in self._kept:
            self._kept[id(tensor)] = tensor, tensor.to(dtype)
        return self._kept[id(tensor)][1]


@contextmanager
def autocast_as_on_a_card() -> Iterator[None]:
    """Within it, `torch.autocast` for "meta" or "cpu" acts on tensors of the device "meta" as it would on a card's.

    Every context of autocast, on or off, brings `CardCasts`, so that what a backward pass computes again, for which
    torch opens such a context, is treated as it was the first time.
    """
    casts = CardCasts()
    begin, end, made = torch.autocast.__enter__, torch.autocast.__exit__, torch.autocast.__init__
    forget, is_on, get_dtype = torch.clear_autocast_cache, torch.is_autocast_enabled, torch.get_autocast_dtype

    def init(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        made(self, _known(device_type), *args, **kwargs)

    def enter(self: torch.autocast) -> Any:
        result = begin(self)
        casts.__enter__()
        return result

    def leave(self: torch.autocast, *error: Any) -> Any:
        casts.__exit__(*error)
        return end(self, *error)

    def forget_all() -> None:
        casts.forget()
        forget()

    with ExitStack() as stack:
        for owner, name, function in (
            (torch.autocast, "__init__", init),
            (torch.autocast, "__enter__", enter),
            (torch.autocast, "__exit__", leave),
            (torch, "clear_autocast_cache", forget_all),
            (torch, "is_autocast_enabled", lambda device="cpu": is_on(_known(device))),
            (torch, "get_autocast_dtype", lambda device: get_dtype(_known(device))),
        ):
            stack.enter_context(patch.object(owner, name, function))
        yield


def _known(device_type: str) -> str:
    return "cpu" if device_type == "meta" else device_type


def _to_full(tensor: Tensor) -> Tensor:
    is_half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if tensor.is_meta and is_half else tensor


def _attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **words: Any
) -> Tensor:
    """The kernel that a card takes: flash attention in half precision, else the memory-efficient one."""
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]
    if attn_mask is not None:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).expand(*q.shape[:-1], k.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, needs_grad, dropout_p)[0]
