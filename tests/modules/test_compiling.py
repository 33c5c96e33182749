"""One graph for each size of clip, and an error, never the plain network, where there is none.

Graphs are traced (`eager`, `aot_eager`) and compiled by nobody: that takes minutes, and shows nothing about them.
"""

from __future__ import annotations

import pytest
import torch

from ldm.callbacks import CompileNetwork
from ldm.errors import UserError
from ldm.modules import compiled as compiling
from ldm.modules.compiled import compile_by_shape, undo_compile
from ldm.modules.temporal import PseudoConv3d
from tests.toy_run import ToyModel


class SmallNetwork(torch.nn.Module):
    """Two convolutions with time in them, called as the UNet is; above 6 frames it does what no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = PseudoConv3d(4, 8), PseudoConv3d(8, 4)

    def forward(self, x, timesteps, enable_time=True):
        frames = x.shape[1]
        if frames > 6:
            x = x * float(timesteps.sum().item() > frames)
            torch._dynamo.graph_break()
        num_frames = frames if enable_time and frames > 1 else None
        h = self.first(x.flatten(0, 1), num_frames) + timesteps[0]
        return self.second(h.relu(), num_frames).unflatten(0, (-1, frames))


@pytest.fixture
def network():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return SmallNetwork()


def clip(frames):
    return torch.randn(2, frames, 4, 8, 8, generator=torch.Generator().manual_seed(frames))


def test_every_number_of_frames_one_included_has_a_graph_that_says_the_same(network):
    names, time = list(network.state_dict()), torch.tensor([3.0])
    plain = {frames: network(clip(frames), time) for frames in (1, 2, 5)}
    compiled = compile_by_shape(network, "aot_eager")
    for frames, expected in plain.items():
        out = network(clip(frames), time)
        assert torch.allclose(out, expected, atol=1e-6)
        out.sum().backward()
    assert len(compiled.shapes) == 3
    assert all(weight.grad is not None for weight in network.parameters())
    assert list(network.state_dict()) == names
    undo_compile(network)
    assert torch.equal(network(clip(2), time), plain[2])


def test_more_sizes_than_dynamo_would_compile_all_have_graphs(network):
    traced = 0

    def count(graph, inputs):
        nonlocal traced
        traced += 1
        return graph.forward

    compiled = compile_by_shape(network, "eager")
    compiled.compiled = torch.compile(compiled.forward, dynamic=False, fullgraph=True, backend=count)
    sizes = [(frames, height) for frames in (1, 2, 3) for height in (2, 4, 6, 8)]  # more than its limit of 8
    with torch.no_grad():
        for frames, height in sizes * 2:
            network(torch.zeros(1, frames, 4, height, 8), torch.tensor([3.0]))
    assert traced == len(sizes)


def test_what_cannot_be_compiled_is_an_error_that_names_the_frames(network):
    compile_by_shape(network, "eager")
    with pytest.raises(UserError, match=r"cannot be compiled for 7 frames of 8x8 \(.+\); leave compile out"):
        network(clip(7), torch.tensor([3.0]))


def test_too_many_sizes_are_an_error(network, monkeypatch):
    monkeypatch.setattr(compiling, "MAX_GRAPHS", 1)
    compile_by_shape(network, "eager")
    network(clip(2), torch.tensor([3.0]))
    with pytest.raises(UserError, match="3 frames of 8x8 would be graph 2 of the network"):
        network(clip(3), torch.tensor([3.0]))


def test_a_back_end_that_does_not_exist_is_refused(network):
    with pytest.raises(UserError, match="expected backend to be one of inductor, aot_eager, eager, found 'fast'"):
        compile_by_shape(network, "fast")
    with pytest.raises(UserError, match="CompileNetwork: expected backend to be one of"):
        CompileNetwork("fast")


def test_the_callback_compiles_for_the_run_alone(network):
    module = torch.nn.Module()
    module.unet = network
    callback = CompileNetwork("eager")
    callback.setup(None, module, "fit")
    callback.on_fit_start(None, module)
    assert isinstance(network.forward, compiling.CompiledByShape)
    callback.on_fit_end(None, module)
    assert network.forward.__func__ is SmallNetwork.forward
    with pytest.raises(UserError, match="CompileNetwork: ToyModel has no UNet"):
        callback.setup(None, ToyModel(0.1), "fit")
