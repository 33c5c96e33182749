"""One graph for each size of clip, or an error that names it; replayed calls; joined projections; settings of a GPU.

Graphs are traced (`eager`, `aot_eager`), not compiled: compiling takes minutes and tests torch.
"""

from __future__ import annotations

import pytest
import torch

from ldm.callbacks import CompileNetwork
from ldm.devices import set_up_gpu
from ldm.errors import UserError
from ldm.modules import compiled
from ldm.modules.attention import CrossAttention
from ldm.modules.compiled import GraphReplay, check_cuda_graphs, compile_by_shape, undo_compile, use_cuda_graphs
from ldm.modules.nn import join_projections
from ldm.modules.temporal import PseudoConv3d, TemporalAttention
from tests.conftest import draw, relative_error
from tests.toy_run import ToyModel


class SmallNetwork(torch.nn.Module):
    """Temporal convolutions and attention, called as the UNet is; above 6 frames no graph can hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.attention = PseudoConv3d(4, 16), TemporalAttention(16, 2, "auto")
        torch.nn.init.normal_(self.attention.to_out.weight)

    def forward(self, x, timesteps, enable_time=True):
        frames = x.shape[1]
        if frames > 6:
            torch._dynamo.graph_break()
        num_frames = frames if enable_time and frames > 1 else None
        h = (self.conv(x.flatten(0, 1), num_frames) + timesteps[0]).flatten(2).mT
        h = h if num_frames is None else h + self.attention(h, num_frames)
        return h.unflatten(0, (-1, frames))


TIME = torch.tensor([3.0])


@pytest.fixture
def network():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return SmallNetwork()


def clip(frames, height=8):
    return draw(2, frames, 4, height, 8, seed=frames)


@pytest.mark.numeric
@pytest.mark.slow
def test_every_number_of_frames_has_a_graph_with_the_same_output(network):
    """Also one frame; the graph calls the same operators."""
    names = list(network.state_dict())
    plain = {frames: network(clip(frames), TIME) for frames in (1, 3)}
    graphs = compile_by_shape(network, "aot_eager")
    for frames, expected in plain.items():
        out = network(clip(frames), TIME)
        assert relative_error(out, expected) <= 1e-6
        out.sum().backward()
    assert len(graphs.shapes) == 2
    assert all(weight.grad is not None for weight in network.parameters())
    assert list(network.state_dict()) == names
    undo_compile(network)
    assert torch.equal(network(clip(3), TIME), plain[3])


@pytest.mark.slow
def test_more_sizes_than_dynamo_would_compile_all_have_graphs(network):
    traced = []
    graphs = compile_by_shape(network, "eager")
    graphs.compiled = torch.compile(graphs.forward, dynamic=False, fullgraph=True,
                                    backend=lambda graph, inputs: traced.append(graph) or graph.forward)  # fmt: skip
    sizes = [(frames, height) for frames in (1, 2, 3) for height in (2, 4, 6)]  # more than its limit of 8
    with torch.no_grad():
        for frames, height in sizes * 2:
            network(clip(frames, height), TIME, enable_time=False)
    assert len(traced) == len(sizes)


def test_a_network_that_cannot_be_compiled_is_an_error_that_names_the_frames(network):
    compile_by_shape(network, "eager")
    with pytest.raises(UserError, match=r"cannot be compiled for 7 frames of 8x8 \(.+\); leave compile out"):
        network(clip(7), TIME)


def test_too_many_sizes_are_an_error(network, monkeypatch):
    monkeypatch.setattr(compiled, "MAX_GRAPHS", 1)
    compile_by_shape(network, "eager").compiled = network.forward
    network(clip(2), TIME)
    with pytest.raises(UserError, match="3 frames of 8x8 would be graph 2 of the network"):
        network(clip(3), TIME)


def test_unknown_compilers_are_refused(network):
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
    assert isinstance(network.forward, compiled.CompiledByShape)
    callback.on_fit_end(None, module)
    assert network.forward.__func__ is SmallNetwork.forward
    with pytest.raises(UserError, match="CompileNetwork: ToyModel has no UNet"):
        callback.setup(None, ToyModel(0.1), "fit")


class Recorder:
    """As CUDA records: the call is made once, and a replay fills the same tensor from the same inputs."""

    def __init__(self) -> None:
        self.num = 0

    def __call__(self, call):
        self.num += 1
        out = call()
        return lambda: out.copy_(call())


class FrozenNetwork(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x, timesteps, context, enable_time=True, fps=None):
        out = self.linear(x) + timesteps[:, None] + context.mean()
        out = out * 2 if enable_time else out
        return out if fps is None else out + fps[:, None]


def test_replay_reads_new_inputs_and_returns_tensors_that_stay():
    network, recorder = FrozenNetwork(), Recorder()
    plain, network.forward = network.forward, GraphReplay(network, recorder)
    kept = []
    for step in range(3):
        for size, options in (
            (2, {}),
            (3, {}),
            (2, {"enable_time": False}),
            (2, {"fps": torch.full((2,), 1.0 * step)}),
        ):
            inputs = draw(size, 4, seed=step), torch.full((size,), float(step)), draw(1, 3)
            kept.append((network(*inputs, **options), plain(*inputs, **options)))
    assert all(torch.equal(ours, theirs) for ours, theirs in kept)
    assert recorder.num == 4  # one for each kind of call


def test_cuda_graphs_need_a_gpu_and_a_frozen_network():
    with pytest.raises(UserError, match="--cuda-graphs: expected an NVIDIA GPU, found 'cpu'; leave it out"):
        check_cuda_graphs(torch.device("cpu"))
    with pytest.raises(ValueError, match="a recording has no gradients; freeze the network first"):
        use_cuda_graphs(torch.nn.Linear(2, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_replays_the_same_bits():
    network = FrozenNetwork().cuda()
    plain = network.forward
    use_cuda_graphs(network)
    for step in range(3):
        inputs = draw(2, 4, seed=step).cuda(), draw(2).cuda(), draw(1, 3).cuda()
        assert torch.equal(network(*inputs), plain(*inputs))


LAYERS = {
    "frames": (lambda: TemporalAttention(32, 2), lambda layer, x: layer(x, 5)),
    "pixels": (lambda: CrossAttention(32, None, 2, 16), lambda layer, x: layer(x)),
    "text": (lambda: CrossAttention(32, 24, 2, 16), lambda layer, x: layer(x, x[:2, :3, :24])),
    "text as wide as pixels": (lambda: CrossAttention(32, 32, 2, 16), lambda layer, x: layer(x, x[:2, :3])),
}


@pytest.mark.numeric
@pytest.mark.parametrize("name", LAYERS)
def test_joined_projections_are_the_same_weights_under_the_same_names(name):
    build, call = LAYERS[name]
    layer, x = build().double().requires_grad_(False), draw(10, 6, 32).double()
    torch.nn.init.normal_((layer.to_out if name == "frames" else layer.to_out[0]).weight)
    before, out = {key: value.clone() for key, value in layer.state_dict().items()}, call(layer, x)
    assert join_projections(torch.nn.ModuleList([layer])) == 1
    after = layer.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert relative_error(call(layer, x), out) <= 1e-13
    assert layer.to_v.weight.untyped_storage().data_ptr() == layer.joined.untyped_storage().data_ptr()
    layer.to_v.weight.zero_()  # as when other weights are loaded: the joined ones are the same memory
    joined = call(layer, x)
    assert relative_error(call(layer.double(), x), joined) <= 1e-13 and layer.joined is None


def test_trained_projections_are_not_joined():
    with pytest.raises(ValueError, match="projections with trained weights cannot be joined"):
        join_projections(TemporalAttention(32, 2))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("repeatable", [True, False])
def test_settings_of_a_gpu(exact, repeatable, monkeypatch):
    chosen = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda kind: chosen.update(products=kind))
    flags = {name: getattr(torch.backends.cudnn, name) for name in ("allow_tf32", "deterministic", "benchmark")}
    try:
        set_up_gpu(exact, repeatable)
        chosen |= {name: getattr(torch.backends.cudnn, name) for name in flags}
    finally:
        for name, value in flags.items():
            setattr(torch.backends.cudnn, name, value)
    assert chosen == {
        "products": "highest" if exact else "high",
        "allow_tf32": not exact,
        "deterministic": repeatable,
        "benchmark": not repeatable,
    }


def test_without_a_gpu_nothing_is_set(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    set_up_gpu(exact=False, repeatable=False)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == before
