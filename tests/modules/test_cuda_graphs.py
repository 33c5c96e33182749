"""Playing the network back, with a recorder that any machine has, and on a card with CUDA's own; joined projections."""

from __future__ import annotations

import pytest
import torch

from ldm.devices import set_up_gpu
from ldm.errors import UserError
from ldm.modules.attention import CrossAttention
from ldm.modules.compiled import GraphReplay, check_cuda_graphs, use_cuda_graphs
from ldm.modules.nn import join_projections
from ldm.modules.temporal import TemporalAttention
from tests.conftest import relative_error

ON_GPU = torch.cuda.is_available()


class Recorder:
    """As CUDA records: the call is made once, and a playback fills the same tensor from the same places."""

    def __init__(self) -> None:
        self.num = 0

    def __call__(self, call):
        self.num += 1
        out = call()
        return lambda: out.copy_(call())


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x, timesteps, context, enable_time=True, fps=None):
        out = self.linear(x) + timesteps[:, None] + context.mean()
        out = out * 2 if enable_time else out
        return out if fps is None else out + fps[:, None]


def test_playback_reads_new_inputs_and_gives_tensors_that_stay():
    network, recorder = Network(), Recorder()
    plain, network.forward = network.forward, GraphReplay(network, recorder)
    kept = []
    for step in range(3):
        for size, words in ((2, {}), (3, {}), (2, {"enable_time": False}), (2, {"fps": torch.full((2,), float(step))})):
            inputs = torch.randn(size, 4), torch.full((size,), float(step)), torch.randn(1, 3)
            kept.append((network(*inputs, **words), plain(*inputs, **words)))
    assert all(torch.equal(ours, theirs) for ours, theirs in kept)
    assert recorder.num == 4  # one for each kind of call


def test_graphs_are_refused_where_there_are_none():
    with pytest.raises(UserError, match="--cuda-graphs: expected an NVIDIA GPU, found 'cpu'; leave it out"):
        check_cuda_graphs(torch.device("cpu"))


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_a_card_plays_back_the_same_bits():
    network = Network().cuda()
    plain = network.forward
    use_cuda_graphs(network)
    for _ in range(3):
        inputs = torch.randn(2, 4).cuda(), torch.randn(2).cuda(), torch.randn(1, 3).cuda()
        assert torch.equal(network(*inputs), plain(*inputs))


LAYERS = {
    "frames": (lambda: TemporalAttention(32, 2), lambda layer, x: layer(x, 5)),
    "pixels": (lambda: CrossAttention(32, None, 2, 16), lambda layer, x: layer(x)),
    "text": (lambda: CrossAttention(32, 24, 2, 16), lambda layer, x: layer(x, x[:2, :3, :24])),
    "text as wide as pixels": (lambda: CrossAttention(32, 32, 2, 16), lambda layer, x: layer(x, x[:2, :3])),
}


@pytest.mark.parametrize("name", LAYERS)
def test_joined_projections_are_the_same_weights_under_the_same_names(name):
    torch.manual_seed(0)
    build, call = LAYERS[name]
    layer, x = build().requires_grad_(False), torch.randn(10, 6, 32)
    torch.nn.init.normal_((layer.to_out if name == "frames" else layer.to_out[0]).weight)
    before, out = {key: value.clone() for key, value in layer.state_dict().items()}, call(layer, x)
    assert join_projections(torch.nn.ModuleList([layer])) == 1
    after = layer.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert relative_error(call(layer, x), out) <= 1e-6
    assert layer.to_v.weight.untyped_storage().data_ptr() == layer.joined.untyped_storage().data_ptr()
    layer.to_v.weight.zero_()  # as loading other weights would: the joined ones are the same memory
    assert relative_error(call(layer, x), call(layer.double().float(), x)) <= 1e-6
    assert layer.joined is None


def test_weights_that_are_trained_are_not_joined():
    with pytest.raises(ValueError, match="projections with trained weights cannot be joined"):
        join_projections(TemporalAttention(32, 2))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("repeatable", [True, False])
def test_settings_of_a_card_are_chosen(exact, repeatable, monkeypatch):
    chosen = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda word: chosen.update(products=word))
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


def test_without_a_card_nothing_is_set(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    set_up_gpu(exact=False, repeatable=False)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == before
