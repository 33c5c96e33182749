"""Which bytes are in use at every moment of a training step, and where in the network is the peak.

Storages are followed, not tensors, so views cost nothing; each counts from the operation that allocates it until its
last reference is gone, in a variable, the autograd graph or a gradient. It works on tensors with values and on fake
ones. Workspaces of kernels are not seen.

`gpu_autocast` makes PyTorch's autocast treat tensors on the device "meta" as it treats a GPU's: which operations run in
which precision, and that casts of trained weights are kept until the outermost autocast ends, is taken from PyTorch's
documentation (torch.amp, "CUDA Ops that can autocast to ...").
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry

from ldm.optim.per_weight import plain_parts

OTHER = "activations and buffers"
aten = torch.ops.aten
# Fused attention on a CPU has the arguments and the work of that on a GPU; torch counts the latter only.
ALIKE = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}


@dataclass
class Peak:
    """The moment of highest use: bytes, also by kind, the phase, and the module or weight."""

    total: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    phase: str = ""
    module: str = ""


@dataclass
class _Held:
    reference: weakref.ref
    num_bytes: int
    kind: str
    is_here: bool


class LiveTensors(TorchDispatchMode):
    """While it is active, every storage that appears counts; earlier ones are added by `label`.

    network: its modules name the locations.  device: whose memory is counted; memory of others is `elsewhere`.

    `flop` are the floating-point operations so far (`torch.utils.flop_counter`), `flop_again` those of them in modules
    that a backward pass recomputes.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.device = torch.device(device.type)
        self.phase = "before"
        self.peaks: dict[str, Peak] = {}  # of each phase
        self.kinds: dict[str, int] = {}
        self.live = self.elsewhere = self.most_elsewhere = 0
        self.flop = self.flop_again = 0
        self._held: dict[int, _Held] = {}
        self._names = {id(module): name for name, module in network.named_modules()}
        self._weight_names = {id(weight): name for name, weight in network.named_parameters()}
        self._path: list[str] = []
        self._numbers, self._paths = [0], [""]  # first autograd node of each location

    @property
    def peak(self) -> Peak:
        """The highest peak of all phases."""
        return max(self.peaks.values(), key=lambda peak: peak.total, default=Peak())

    def label(self, kind: str, tensors: Iterable[Tensor]) -> int:
        """Count these tensors, known or new, under a kind; returns the bytes of their storages."""
        num_bytes = 0
        for tensor in tensors:
            for part in plain_parts(tensor):
                held = self._hold(part)
                self._add(held, -1)
                held.kind = kind
                self._add(held, 1)
                num_bytes += held.num_bytes
        self._note()
        return num_bytes

    def reserve(self, kind: str, num_bytes: int, is_here: bool = True) -> None:
        """Count bytes that stay in use and belong to no tensor."""
        self._count_bytes(kind, num_bytes, is_here)
        self._note()

    def note_more(self, kind: str, num_bytes: int) -> None:
        """Count bytes that are in use at this moment only."""
        self.reserve(kind, num_bytes)
        self.reserve(kind, -num_bytes)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Track the context as a phase; running modules name the location."""
        self.phase, before = phase, self.phase
        handles = (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        )
        self._note()
        try:
            with self:
                yield
        finally:
            self.phase = before
            self._path.clear()
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # the most frequent call by far
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = False
        for value in tree_iter(out):
            for part in plain_parts(value) if isinstance(value, Tensor) else ():
                made |= part.untyped_storage()._cdata not in self._held
                self._hold(part)
        packet = ALIKE.get(func.overloadpacket, func.overloadpacket)
        if packet in flop_registry:
            cost = flop_registry[packet](*args, **kwargs, out_val=out)
            self.flop += cost
            self.flop_again += cost if self._path and torch._C._current_autograd_node() is not None else 0
        if made:
            self._note()
        return out

    def _hold(self, tensor: Tensor) -> _Held:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held:
            reference = weakref.ref(storage, lambda _: self._add(self._held.pop(key), -1))
            is_here = tensor.device.type == self.device.type
            self._held[key] = _Held(reference, storage.nbytes(), OTHER, is_here)
            self._add(self._held[key], 1)
        return self._held[key]

    def _add(self, held: _Held, sign: int) -> None:
        self._count_bytes(held.kind, sign * held.num_bytes, held.is_here)

    def _count_bytes(self, kind: str, num_bytes: int, is_here: bool) -> None:
        if is_here:
            self.live += num_bytes
            self.kinds[kind] = self.kinds.get(kind, 0) + num_bytes
        else:
            self.elsewhere += num_bytes
            self.most_elsewhere = max(self.most_elsewhere, self.elsewhere)

    def _note(self) -> None:
        peak = self.peaks.setdefault(self.phase, Peak(phase=self.phase))
        if self.live > peak.total:
            peak.total, peak.kinds, peak.module = self.live, dict(self.kinds), self._location()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        name = self._names.get(id(module))
        self._path.append(self._path[-1] if name is None and self._path else name or "")
        self._mark()

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._path:
            self._path.pop()
        self._mark()

    def _mark(self) -> None:
        number = torch.autograd._get_sequence_nr()
        path = self._path[-1] if self._path else ""
        if number == self._numbers[-1]:
            self._paths[-1] = path
        else:
            self._numbers.append(number)
            self._paths.append(path)

    def _location(self) -> str:
        """The module in its forward or backward pass, or the weight whose gradient is accumulated."""
        if self._path:
            return self._path[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return ""
        if (weight := getattr(node, "variable", None)) is not None:
            return self._weight_names.get(id(weight), "")
        return self._paths[bisect_right(self._numbers, node._sequence_nr()) - 1]


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
# These too, unless a dtype is given.
IN_FULL_WITHOUT_DTYPE = {F.softmax, F.log_softmax, torch.softmax, torch.sum, Tensor.softmax, Tensor.sum}


class GPUCasts(TorchFunctionMode):
    """Casts as autocast does on a GPU, while autocast is on."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu"):
            if func in IN_HALF:
                args, kwargs = tree_map_only(Tensor, self._to_half, (args, kwargs))
            elif func in IN_FULL or (func in IN_FULL_WITHOUT_DTYPE and kwargs.get("dtype") is None):
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
        if id(tensor) not in self.kept:
            self.kept[id(tensor)] = tensor, tensor.to(dtype)
        return self.kept[id(tensor)][1]


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """In this context `torch.autocast` for "meta" or "cpu" acts on tensors of the device "meta" as on a GPU's.

    Every autocast context, on or off, activates `GPUCasts`, so recomputation in a backward pass, for which torch opens
    such a context, is cast as in the forward pass.
    """
    casts = GPUCasts()
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
        casts.kept.clear()
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
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    """A GPU's kernel: flash attention in half precision, otherwise the memory-efficient one."""
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]
    if attn_mask is not None:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).expand(*q.shape[:-1], k.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, needs_grad, dropout_p)[0]
