"""The running average of the weights: its values, when it is applied, and how it is saved and resumed."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.callbacks import WeightAverage
from ldm.callbacks.average import average_key
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from tests.conftest import relative_error
from tests.toy_run import ToyModel, fit, last, read


def test_average_equals_compvis_ema(goldens):
    golden = goldens("schedule")
    module, average = torch.nn.Linear(3, 2, bias=False), WeightAverage(decay=0.9999)
    for step in range(4):
        module.weight.data.copy_(golden[f"ema.w{step}"])
        average.update(module)
        if step:
            assert relative_error(average.averages["weight"], golden[f"ema.shadow{step}"]) < 1e-6
    assert average.num_updates == golden["ema.num_updates"].item() == 3


def test_only_trained_weights_are_averaged_once_a_step(root, tmp_path):
    average = WeightAverage(decay=0.5)
    model = fit(root, tmp_path, [average], steps=3, accumulate_grad_batches=2)
    assert set(average.averages) == {"head.weight", "head.bias"}
    assert average.num_updates == 3, "once per optimiser step, not per micro-batch"
    assert average.num_bytes == sum(weight.nbytes for weight in model.head.parameters())


def test_the_average_of_half_precision_weights_is_kept_in_full():
    module, average = torch.nn.Linear(3, 2).bfloat16(), WeightAverage(decay=0.9999)
    module.weight.data.zero_()
    average.update(module)
    average.num_updates = 10**6
    module.weight.data += 1
    average.update(module)
    assert average.averages["weight"].dtype == torch.float32
    torch.testing.assert_close(average.averages["weight"], torch.full((2, 3), 1e-4))
    with average.applied(module):
        assert module.weight.dtype == torch.bfloat16


def test_applied_swaps_and_gives_back_even_after_an_error():
    module, average = torch.nn.Linear(3, 2), WeightAverage(decay=0.9)
    average.update(module)
    module.weight.data += 1
    trained = module.weight.detach().clone()
    with pytest.raises(RuntimeError), average.applied(module):
        assert torch.equal(module.weight, average.averages["weight"])
        raise RuntimeError
    assert torch.equal(module.weight, trained)


def test_validation_sees_the_average_and_training_does_not(root, tmp_path):
    average, plain = WeightAverage(decay=0.9), fit(root, tmp_path / "plain", [])
    seen = {}

    class Watch(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            seen[trainer.global_step] = pl_module.head.weight.detach().clone()

    averaged = fit(root, tmp_path / "averaged", [average, Watch()], val_check_interval=2)
    assert torch.equal(plain.head.weight, averaged.head.weight)
    assert torch.equal(seen[4], average.averages["head.weight"])
    assert not torch.equal(seen[4], averaged.head.weight)


def test_the_average_travels_in_the_state_dict_under_compvis_names(root, tmp_path):
    average = WeightAverage(decay=0.9)
    fit(root, tmp_path, [average])
    tensors = read(last(tmp_path))["state_dict"]
    assert torch.equal(tensors["model_ema.headweight"], average.averages["head.weight"])
    assert tensors["model_ema.decay"].dtype == torch.float32 and tensors["model_ema.num_updates"].item() == 4
    assert tensors["model_ema.num_updates"].dtype == torch.int32
    assert "model_ema.frozenweight" not in tensors
    assert average_key("unet.input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"


def test_an_average_may_start_late_but_not_of_other_weights(root, tmp_path):
    fit(root, tmp_path, [])
    late = WeightAverage(decay=0.9)
    fit(root, tmp_path, [late], steps=6, resume=last(tmp_path))
    assert late.num_updates == 2
    other = ToyModel(learning_rate=0.05)
    other.frozen.requires_grad_(True)
    with pytest.raises(UserError, match=r"no average of 2 of the 4 trained weights, such as frozen.weight"):
        fit(root, tmp_path, [WeightAverage()], model=other, steps=8, resume=last(tmp_path))


def test_checkpoints_without_averages_are_errors(root, tmp_path):
    weights_only = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_weights_only=True)
    fit(root, tmp_path, [weights_only], steps=1)
    with pytest.raises(UserError, match=r"save_weights_only: such a file would lack the averages; leave it out"):
        fit(root, tmp_path, [WeightAverage(), weights_only], steps=1)

    class Plain(ToyModel):
        keeps_averages = False

    with pytest.raises(UserError, match="the checkpoints of Plain hold no averages; remove the callback"):
        fit(root, tmp_path, [WeightAverage()], model=Plain(learning_rate=0.1), steps=1)
    assert not AutoencoderKL.keeps_averages


def averaged(steps: int, **options) -> tuple[WeightAverage, torch.nn.Module]:
    """The average over a slow drift: each step is a tenth of the last place of a bfloat16 near one."""
    module, average = torch.nn.Linear(40, 50), WeightAverage(decay=0.999, **options)
    module.weight.data, module.bias.data = torch.linspace(1, 1.9, 2000).view(50, 40), torch.zeros(50)
    average.update(module)
    average.num_updates = 10**6
    for _ in range(steps):
        module.weight.data += 8e-4
        average.update(module)
    return average, module


def test_an_average_in_bfloat16_moves_as_it_should():
    exact, module = averaged(400)
    half, _ = averaged(400, dtype="bfloat16")
    assert half.averages["weight"].dtype == torch.bfloat16 and half.averages["bias"].dtype == torch.float32
    assert half.num_bytes == 2 * 2000 + 4 * 50
    error = half.averages["weight"].double() - exact.averages["weight"].double()
    assert error.mean().abs() < 3 * error.std() / 2000**0.5
    assert error.std() < 4 * 2**-7, "a few of the last place"
    moved = exact.averages["weight"] - torch.linspace(1, 1.9, 2000).view(50, 40)
    assert moved.mean() > 0.04 and (error.mean() / moved.mean()).abs() < 0.02
    nearest = torch.linspace(1, 1.9, 2000).view(50, 40).bfloat16()
    assert torch.equal(nearest.float().lerp(module.weight, 1e-3).bfloat16(), nearest), "nearest rounding stands still"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_average_in_host_memory_is_the_same(dtype):
    beside, away = (averaged(5, dtype=dtype, device=device)[0].averages for device in (None, "cpu"))
    assert all(torch.equal(beside[name], away[name]) for name in beside)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_average_in_host_memory_is_the_same_on_a_gpu():
    module, averages = torch.nn.Linear(64, 64).cuda(), {}
    for device in (None, "cpu"):
        average = averages[device] = WeightAverage(decay=0.9, device=device)
        for step in range(4):
            module.weight.data.fill_(step)
            average.update(module)
            average.on_before_backward(None, module, None)
    torch.cuda.synchronize()
    assert averages["cpu"].averages["weight"].device.type == "cpu"
    assert torch.equal(averages[None].averages["weight"].cpu(), averages["cpu"].averages["weight"])


class StandInStreams(TorchDispatchMode):
    """Streams, without a GPU; collects storages of the main stream that are freed while the side stream reads them."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.on_side, self.read, self.recorded, self.made_on_side, self.freed_early = False, {}, set(), set(), []
        side = SimpleNamespace(device=torch.device("cpu"), wait_stream=lambda main: None)
        monkeypatch.setattr(
            WeightAverage, "_side_stream", lambda average, device: setattr(average, "_stream", side) or side
        )
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_stream=self.join))
        monkeypatch.setattr(torch.cuda, "stream", self.entered)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: self.recorded.add(x.untyped_storage()))

    @contextmanager
    def entered(self, stream):
        self.on_side = True
        yield
        self.on_side = False

    def join(self, side):
        self.read.clear()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if self.on_side:
            self.made_on_side.update(id(x.untyped_storage()) for x in (out,) if isinstance(x, torch.Tensor))
            for x in (x for x in args if isinstance(x, torch.Tensor)):
                key = id(x.untyped_storage())
                if key not in self.made_on_side and x.untyped_storage() not in self.recorded and key not in self.read:
                    self.read[key] = str(function)
                    weakref.finalize(x.untyped_storage(), self.freed, key)
        return out

    def freed(self, key):
        if key in self.read:
            self.freed_early.append(self.read[key])


def test_what_the_stream_of_the_average_reads_is_not_freed_before_the_join(monkeypatch):
    average = WeightAverage(device="cpu")
    module = torch.nn.Linear(4, 4)
    with StandInStreams(monkeypatch) as streams:
        average.update(module)
        for _ in range(2):
            average.update(module, torch.ones(()))
            gc.collect()
            assert streams.recorded and not streams.freed_early
            average.on_before_backward(None, module, None)


@pytest.mark.parametrize(("device", "dtype"), [(None, "float32"), ("cpu", "float32"), ("cpu", "bfloat16")])
def test_average_is_resumed_bit_by_bit(root, tmp_path, device, dtype):
    options = {"decay": 0.9, "device": device, "dtype": dtype}
    straight, again = WeightAverage(**options), WeightAverage(**options)
    fit(root, tmp_path / "straight", [straight], steps=6)
    fit(root, tmp_path / "run", [WeightAverage(**options)], steps=3)
    fit(root, tmp_path / "run", [again], steps=6, resume=last(tmp_path / "run"))
    assert again.num_updates == 6
    for name, value in straight.averages.items():
        assert value.dtype == again.averages[name].dtype and torch.equal(value, again.averages[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "found 1.0"),
        ({"decay": -0.1}, "found -0.1"),
        ({"device": "disk"}, "expected the device cpu, or null for that of the weights, found 'disk'"),
        ({"dtype": "float16"}, "expected the dtype float32 or bfloat16, found 'float16'"),
    ],
)
def test_invalid_options_are_errors(options, message):
    with pytest.raises(UserError, match=message):
        WeightAverage(**options)
