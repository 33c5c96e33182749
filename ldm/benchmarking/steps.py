"""One training step of a contestant: forward, backward, AdamW; and its work, counted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ldm.benchmarking.contestants import CONTESTANTS, PRECISIONS, Case, Inputs
from ldm.benchmarking.timing import wait_for

LEARNING_RATE = 1e-5


class TrainingStep:
    """Calling it takes one step with all weights trained: float32 weights, autocast for bf16, torch's fused AdamW."""

    def __init__(self, name: str, case: Case, device: torch.device) -> None:
        self.contestant, self.device = CONTESTANTS[name], device
        torch.manual_seed(42)
        with torch.device(device):
            self.network = self.contestant.build(case).train()
        self.inputs = Inputs.draw(case, device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE, fused=True)
        self.dtype = PRECISIONS[case.precision]

    def __call__(self) -> None:
        self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def forward_backward(self) -> None:
        """The loss and its gradients."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            out = self.contestant.predict(self.network, self.inputs)
        F.mse_loss(out.float(), self.inputs.target).backward()

    def own_bytes(self) -> int:
        """Bytes of weights, gradients and states, beside activations."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.network.parameters(), *self.network.buffers(), *filter(torch.is_tensor, states)]
        return sum(tensor.nbytes for tensor in tensors)

    def peak_on_card(self) -> int | None:
        """Most bytes on a card during a step, without those of its neighbours; None on a processor."""
        if self.device.type != "cuda":
            return None
        wait_for(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        neighbours = torch.cuda.memory_allocated(self.device) - self.own_bytes()
        self()
        wait_for(self.device)
        return torch.cuda.max_memory_allocated(self.device) - neighbours


def count_flop(name: str, case: Case, step: TrainingStep) -> int:
    """Operations of a step's forward and backward pass, counted on tensors without values; AdamW's are left out.

    step: is counted where a network looks at values on its way.
    """
    contestant = CONTESTANTS[name]
    with torch.device("meta"):
        network = contestant.build(case)
    inputs = Inputs.draw(case, "meta")
    with FlopCounterMode(display=False) as counter:
        try:
            F.mse_loss(contestant.predict(network, inputs), inputs.target).backward()
            return counter.get_total_flops()
        except RuntimeError as error:
            if "meta" not in str(error):
                raise
    with FlopCounterMode(display=False) as counter:
        step.forward_backward()
    step.optimizer.zero_grad(set_to_none=True)
    return counter.get_total_flops()
