"""An optimiser that updates one weight after the other, each in float32, however it is stored.

Only one weight at a time exists in float32 and, with steps in the backward pass, only one gradient. The update itself
is a library's optimiser, given one weight at a time (as in Lv et al. 2023, "Full Parameter Fine-tuning for Large
Language Models with Limited Resources", section 3.1). Its states may lie in host memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ldm.errors import UserError
from ldm.optim.stored_weights import StoredWeights

State = dict[str, Any]  # tensors, quantised ones among them, and numbers


class HostStates:
    """Optimiser states by weight in host memory; for weights in host memory a plain dictionary.

    With a GPU, copies run on streams of their own, in pinned memory: the states of the next weight arrive while one is
    updated, and those of the last one leave. The host never waits.
    """

    def __init__(self) -> None:
        self._states: dict[nn.Parameter, State] = {}
        self._coming: dict[nn.Parameter, tuple[State, torch.cuda.Event]] = {}
        self._written: dict[nn.Parameter, torch.cuda.Event] = {}
        self._next: dict[nn.Parameter, nn.Parameter] = {}  # the order of the last step
        self._last: nn.Parameter | None = None
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}

    def fetch(self, weight: nn.Parameter) -> State:
        """The states of a weight on its device; empty before its first update."""
        if weight.device.type != "cuda":
            return self._states.get(weight, {})
        if self._last is not None:
            self._next[self._last] = weight
        self._last = weight
        state = self._arrived(weight)
        following = self._next.get(weight)
        if following is not None and following is not weight and following not in self._coming:
            self._send_for(following)
        return state

    def keep(self, weight: nn.Parameter, state: State) -> None:
        """Return the states of a weight to host memory."""
        if weight.device.type != "cuda":
            self._states[weight] = state
            return
        _, outwards = self._streams_of(weight.device)
        kept = self._states.setdefault(weight, {})
        outwards.wait_stream(torch.cuda.current_stream(weight.device))
        with torch.cuda.stream(outwards):
            for name, value in state.items():
                if not _is_moved(value):
                    kept[name] = value
                    continue
                if name not in kept:
                    kept[name] = map_parts(value, lambda part: torch.empty_like(part, device="cpu", pin_memory=True))
                for here, there in zip(plain_parts(kept[name]), plain_parts(value), strict=True):
                    here.copy_(there, non_blocking=True)
                    there.record_stream(outwards)
            self._written[weight] = outwards.record_event()

    def set(self, weight: nn.Parameter, state: State) -> None:
        """Store states that were read from a file."""

        def to_host(part: Tensor) -> Tensor:
            copy = part.detach().to("cpu", copy=True)
            return copy.pin_memory() if weight.device.type == "cuda" else copy

        self._coming.pop(weight, None)
        self._written.pop(weight, None)
        self._states[weight] = _map_moved(state, to_host)

    def all(self) -> dict[nn.Parameter, State]:
        """Every weight's states, after pending copies."""
        for _, outwards in self._streams.values():
            outwards.synchronize()
        return self._states

    def end_step(self) -> None:
        """The next weight that is fetched is the first of another step."""
        self._last = None

    def _arrived(self, weight: nn.Parameter) -> State:
        if weight not in self._states:
            return {}
        if weight not in self._coming:
            self._send_for(weight)
        state, event = self._coming.pop(weight)
        now = torch.cuda.current_stream(weight.device)
        now.wait_event(event)
        for value in filter(_is_moved, state.values()):
            for part in plain_parts(value):
                part.record_stream(now)
        return state

    def _send_for(self, weight: nn.Parameter) -> None:
        if weight not in self._states:
            return
        inwards, _ = self._streams_of(weight.device)
        if weight in self._written:
            inwards.wait_event(self._written[weight])
        with torch.cuda.stream(inwards):
            state = _map_moved(self._states[weight], lambda part: part.to(weight.device, non_blocking=True))
            self._coming[weight] = state, inwards.record_event()

    def _streams_of(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams[device]


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor consists of: itself, or codes, scales and map of a quantised one."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(tensor, name))
    else:
        yield tensor


def map_parts(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The tensor with each of its `plain_parts` changed."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return change(tensor)
    names, context = tensor.__tensor_flatten__()
    parts = {name: map_parts(getattr(tensor, name), change) for name in names}
    return type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())


def _is_moved(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0  # counters stay where their optimiser put them


def _map_moved(state: State, change: Callable[[Tensor], Tensor]) -> State:
    return {name: map_parts(value, change) if _is_moved(value) else value for name, value in state.items()}


HYPERPARAMETERS = ("weight_decay", "betas")  # of the config, whatever a checkpoint says
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class WeightByWeight(torch.optim.Optimizer):
    """Steps like the library's optimiser on float32 weights; each reads the other's state dict.

    groups: as any optimiser takes them, with `params` and `lr`.
    make: builds the library's optimiser.
    weights: how the weights are stored; None: in float32.
    in_backward: update each weight as soon as its gradient is complete and drop the gradient; `step` then only counts.
        Until `close`, every backward pass through the weights is a step.
    on_host: states lie in host memory between steps.

    `found_inf`: None, or a number on the device: where it is 1, a step leaves weights and states unchanged and only
    counts the update, which selects the rounding draws. With `in_backward` it also becomes 1 at the first gradient that
    is not finite: weights whose gradients came before are updated, the others are not.
    `squared_norm`: of the gradients since `found_inf` was set, with `in_backward`. `reads_found_inf`: the host reads it
    before each update, for library optimisers that do not take it, and in host memory.
    """

    found_inf: Tensor | None = None
    squared_norm: Tensor | None = None
    reads_found_inf = False

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        make: MakeOptimizer,
        weights: StoredWeights | None = None,
        in_backward: bool = False,
        on_host: bool = False,
    ) -> None:
        device = groups[0]["params"][0].device
        self.inner = make([{"params": [nn.Parameter(torch.zeros(1, device=device))], "lr": 1.0}])
        defaults = {name: value for name, value in self.inner.param_groups[0].items() if name != "params"}
        super().__init__([dict(group) for group in groups], defaults | {"num_updates": 0})
        self._weights = StoredWeights(nn.Module()) if weights is None else weights
        self._host = HostStates() if on_host else None
        self._groups = {weight: group for group in self.param_groups for weight in group["params"]}
        self._is_half_done = False
        self.in_backward, self.on_host = in_backward, on_host
        hooked = self._groups if in_backward else ()
        self._hooks = [weight.register_post_accumulate_grad_hook(self._on_gradient) for weight in hooked]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every weight that has a gradient; with `in_backward` they are updated already."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.in_backward:
            for weight in self._groups:
                if weight.grad is not None:
                    self._update(weight)
        for group in self.param_groups:
            group["num_updates"] += 1
        self._is_half_done = False
        if self._host is not None:
            self._host.end_step()
        return loss

    def close(self) -> None:
        """Take no more steps in backward passes."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def largest_gradient(self) -> int:
        """Bytes of the largest gradient, the only one in memory with `in_backward`."""
        return max(weight.nbytes for weight in self._groups)

    def states(self) -> dict[nn.Parameter, dict[str, Any]]:
        """The states of every weight, wherever they are."""
        return dict(self.state) if self._host is None else self._host.all()

    def state_dict(self) -> dict[str, Any]:
        """As every optimiser's. Raises RuntimeError between the updates of a step, when states do not match."""
        if self._is_half_done:
            raise RuntimeError("some weights are a step ahead of others: the backward pass did not end")
        packed = super().state_dict()
        if self._host is not None:
            states = self._host.all()
            packed["state"] = {index: states[w] for index, w in enumerate(self._groups) if w in states}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load states in their own precision, not in that of the weights."""
        saved = state_dict["param_groups"]
        sizes, own_sizes = ([len(group["params"]) for group in groups] for groups in (saved, self.param_groups))
        if sizes != own_sizes:
            raise UserError(
                f"optimiser states: expected those of groups of {own_sizes} weights, found groups of {sizes}: they "
                "were written by a run that trained other weights. Resume with its own config"
            )
        # Where the weights were, and the hyperparameters of that run, do not matter here.
        ignored = {"params", "fused", "foreach", "capturable", *HYPERPARAMETERS}
        for group, old in zip(self.param_groups, saved, strict=True):
            group.update({name: value for name, value in old.items() if name in group and name not in ignored})
            group["lr"] = float(group["lr"])
        self.state = defaultdict(dict)
        indices = chain.from_iterable(group["params"] for group in saved)
        for weight, index in zip(self._groups, indices, strict=True):
            if index not in state_dict["state"]:
                continue
            state = {name: with_strides_of(weight, value) for name, value in state_dict["state"][index].items()}
            if self._host is None:
                self.state[weight] = {name: self._placed(value, weight) for name, value in state.items()}
            else:
                counters = {n: self._placed(v, weight) for n, v in state.items() if n == "step"}
                self._host.set(weight, {**state, **counters})

    def _on_gradient(self, weight: nn.Parameter) -> None:
        if weight.grad is None:
            return
        self._is_half_done = True
        with _disable_current_modes():  # a mode that counts the backward pass must not count these
            if not self._is_skipped(weight.grad):
                self._update(weight)
        weight.grad = None

    @torch.no_grad()
    def _is_skipped(self, gradient: Tensor) -> bool:
        """Add a gradient to the norm; whether the host knows that the update is skipped."""
        if self.found_inf is None:
            return False
        square = torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
        self.squared_norm = square if self.squared_norm is None else self.squared_norm + square
        self.found_inf = torch.maximum(self.found_inf, (~square.isfinite()).float())
        return self.reads_found_inf and bool(self.found_inf)

    @torch.no_grad()
    def _update(self, weight: nn.Parameter) -> None:
        group = self._groups[weight]
        is_halved = self._weights.is_halved(weight)
        target = self._weights.full(weight) if is_halved else weight
        if is_halved:
            target.grad = weight.grad.float()
        shown = self.inner.param_groups[0]
        for name, value in group.items():
            if name == "lr" and isinstance(shown["lr"], Tensor):
                shown["lr"].fill_(value)
            elif name != "params":
                shown[name] = float(value) if name == "lr" else value
        shown["params"] = [target]
        self.inner.found_inf = None if self.reads_found_inf else self.found_inf
        state = self.state[weight] if self._host is None else self._host.fetch(weight)
        self.inner.state = defaultdict(dict, {target: state})
        self.inner.step()
        if self._host is not None:
            self._host.keep(weight, self.inner.state[target])
        if is_halved:
            self._weights.put(weight, target, group["num_updates"])
        shown["params"], self.inner.state = [], defaultdict(dict)

    def _placed(self, value: Any, weight: nn.Parameter) -> Any:
        """A state's tensor beside its weight; a counter where the library's optimiser keeps it."""
        if not isinstance(value, Tensor):
            return value
        is_on_device = value.ndim > 0 or self.param_groups[0].get("fused")
        device = weight.device if is_on_device else torch.device("cpu")
        return map_parts(value, lambda part: part.detach().to(device, copy=True))


def with_strides_of(weight: Tensor, value: Any) -> Any:
    """An optimiser's state with the strides of its weight; quantised states and counters are returned as they are."""
    if type(value) is not Tensor or value.shape != weight.shape or value.stride() == weight.stride():
        return value
    return torch.empty_like(weight, dtype=value.dtype, device=value.device).copy_(value)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimiser's states without counters; quantised tensors as they are stored."""
    states = optimizer.states() if isinstance(optimizer, WeightByWeight) else optimizer.state
    values = chain.from_iterable(state.values() for state in states.values())
    return sum(part.nbytes for value in filter(_is_moved, values) for part in plain_parts(value))
