"""Which bytes are in use at every moment of a training step, and where in the network they are most.

Storages are followed, not tensors, so that views cost nothing; each counts from the operation that makes it until the
last reference to it is gone, be it a variable, a graph of autograd or a gradient. It works alike on tensors with values
and on fake ones, without. What kernels take for themselves while they run is not seen.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

OTHER = "activations and buffers"
aten = torch.ops.aten
# Fused attention on a processor takes the arguments and the work of that on a card; torch counts the latter alone.
ALIKE = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}


@dataclass
class Peak:
    """The moment at which most was in use: bytes, of which kinds, in which phase and at which module or weight."""

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
    """While it is on, every storage that appears counts; those from before are told it by `label`.

    network: whose modules name the places.  device: whose memory is counted; what lies on others is `elsewhere`.

    `flop` are the floating-point operations so far (`torch.utils.flop_counter`), `flop_again` those of them that a
    backward pass spends on modules that it computes again.
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
        self._numbers, self._paths = [0], [""]  # from which node of autograd on one is at which place

    @property
    def peak(self) -> Peak:
        """The highest of all phases."""
        return max(self.peaks.values(), key=lambda peak: peak.total, default=Peak())

    def label(self, kind: str, tensors: Iterable[Tensor]) -> int:
        """Count these tensors, whether they were known or not, as of a kind; returns the bytes of their storages."""
        num_bytes = 0
        for tensor in tensors:
            for part in _plain(tensor):
                held = self._hold(part)
                self._move(held, kind)
                num_bytes += held.num_bytes
        self._note()
        return num_bytes

    def reserve(self, kind: str, num_bytes: int, is_here: bool = True) -> None:
        """Count bytes that stay in use and that no tensor stands for."""
        if is_here:
            self.live += num_bytes
            self.kinds[kind] = self.kinds.get(kind, 0) + num_bytes
        else:
            self.elsewhere += num_bytes
            self.most_elsewhere = max(self.most_elsewhere, self.elsewhere)
        self._note()

    def note_more(self, kind: str, num_bytes: int) -> None:
        """Count bytes that are in use for this one moment."""
        self.reserve(kind, num_bytes)
        self.reserve(kind, -num_bytes)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name what happens in the context, and let modules that run name its place."""
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
            return args[0].fake_device  # asked for more often than all else together
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = False
        for value in tree_iter(out):
            for part in _plain(value) if isinstance(value, Tensor) else ():
                made |= part.untyped_storage()._cdata not in self._held
                self._hold(part)
        packet = ALIKE.get(func.overloadpacket, func.overloadpacket)
        if packet in flop_registry:
            self._count(flop_registry[packet](*args, **kwargs, out_val=out))
        if made:
            self._note()
        return out

    def _count(self, cost: int) -> None:
        self.flop += cost
        if self._path and torch._C._current_autograd_node() is not None:
            self.flop_again += cost

    def _hold(self, tensor: Tensor) -> _Held:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held:
            held = _Held(weakref.ref(storage, self._forget(key)), storage.nbytes(), OTHER, self._is_here(tensor))
            self._held[key] = held
            self._add(held, 1)
        return self._held[key]

    def _is_here(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device.type

    def _forget(self, key: int) -> Callable[[weakref.ref], None]:
        def forget(reference: weakref.ref) -> None:
            self._add(self._held.pop(key), -1)

        return forget

    def _move(self, held: _Held, kind: str) -> None:
        self._add(held, -1)
        held.kind = kind
        self._add(held, 1)

    def _add(self, held: _Held, sign: int) -> None:
        if held.is_here:
            self.live += sign * held.num_bytes
            self.kinds[held.kind] = self.kinds.get(held.kind, 0) + sign * held.num_bytes
        else:
            self.elsewhere += sign * held.num_bytes
            self.most_elsewhere = max(self.most_elsewhere, self.elsewhere)

    def _note(self) -> None:
        peak = self.peaks.setdefault(self.phase, Peak(phase=self.phase))
        if self.live > peak.total:
            peak.total, peak.kinds, peak.module = self.live, dict(self.kinds), self._place()

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

    def _place(self) -> str:
        """The module that runs, or whose operation is being taken back, or the weight whose gradient is added up."""
        if self._path:
            return self._path[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return ""
        if (weight := getattr(node, "variable", None)) is not None:
            return self._weight_names.get(id(weight), "")
        return self._paths[bisect_right(self._numbers, node._sequence_nr()) - 1]


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor, or those that a quantised one is made of: only they are stored."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor
