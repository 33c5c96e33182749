"""Callbacks: the average of the weights, atomic saving and signals, memory and progress lines, sample videos."""

from __future__ import annotations

import errno
import logging
import os
import signal

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.callbacks import (
    AtomicCheckpointIO,
    LastCheckpoint,
    MemoryReport,
    ProgressLines,
    StopRequested,
    VideoLogger,
    WeightAverage,
    videos,
)
from ldm.callbacks.average import average_key
from ldm.callbacks.reports import _tensor_bytes
from ldm.data.clips import ClipDataModule
from ldm.errors import UserError, run_command
from ldm.models.diffusion.schedule import NoiseSchedule
from tests.conftest import relative_error
from tests.toy_run import CONTEXT_SHAPE, ToyModel, make_prepared

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_prepared(tmp_path_factory.mktemp("prepared") / "set", lengths=(12, 9, 7, 30))


def fit(root, folder, callbacks, *, model=None, steps=4, resume=None, logger=False, **trainer):
    model = model or ToyModel(learning_rate=0.05)
    data = ClipDataModule(str(root), frames=3, batch_size=2, num_workers=0, val_share=0.2)
    lightning = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[*callbacks, LastCheckpoint(str(folder), {"name": "toy"}, every_n_steps=1000)],
        **trainer,
    )
    lightning.fit(model, data, ckpt_path=resume, weights_only=True)
    return model


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def read(path):
    return torch.load(path, weights_only=True)


# ---- the average


def test_the_average_is_that_of_the_original_code(goldens):
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


def test_the_average_is_resumed_bit_by_bit(root, tmp_path):
    straight, again = WeightAverage(decay=0.9), WeightAverage(decay=0.9)
    fit(root, tmp_path / "straight", [straight], steps=9)
    fit(root, tmp_path / "run", [WeightAverage(decay=0.9)], steps=5)
    fit(root, tmp_path / "run", [again], steps=9, resume=last(tmp_path / "run"))
    assert again.num_updates == 9
    for name, value in straight.averages.items():
        assert torch.equal(value, again.averages[name])


def test_an_average_may_start_late_but_not_of_other_weights(root, tmp_path):
    fit(root, tmp_path, [])
    late = WeightAverage(decay=0.9)
    fit(root, tmp_path, [late], steps=6, resume=last(tmp_path))
    assert late.num_updates == 2
    other = ToyModel(learning_rate=0.05)
    other.frozen.requires_grad_(True)
    with pytest.raises(UserError, match=r"no average of 2 of the 4 trained weights, such as frozen.weight"):
        fit(root, tmp_path, [WeightAverage()], model=other, steps=8, resume=last(tmp_path))


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_that_cannot_be(decay):
    with pytest.raises(UserError, match=f"found {decay}"):
        WeightAverage(decay=decay)


# ---- saving


class FullDisk:
    """A file that takes some bytes and then says that the disk is full."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.file.name))
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 3000, 100_000])
def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(tmp_path, monkeypatch, capsys, room):
    io, path = AtomicCheckpointIO(), tmp_path / "checkpoints" / "last.ckpt"
    io.save_checkpoint({"step": 1, "weight": torch.zeros(100)}, path)
    real_open = type(path).open

    def full_open(self, mode="r", *arguments, **options):
        file = real_open(self, mode, *arguments, **options)
        return FullDisk(file, room) if "w" in mode else file

    monkeypatch.setattr(type(path), "open", full_open)

    def save():
        io.save_checkpoint({"step": 2, "weight": torch.randn(100_000)}, path)

    with pytest.raises(OSError, match="No space left on device"):
        save()
    assert run_command(save) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert io.load_checkpoint(path)["step"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_while_training_keeps_the_old_checkpoint(root, tmp_path, monkeypatch):
    fit(root, tmp_path, [], steps=2)

    def no_room(checkpoint, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", no_room)
    with pytest.raises(OSError, match="No space left"):
        fit(root, tmp_path, [], steps=4, resume=last(tmp_path))
    assert read(last(tmp_path))["global_step"] == 2


def test_checkpoints_are_read_without_running_anything(tmp_path):
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    torch.save({"callback": print}, path)
    with pytest.raises(UserError, match=r"last.ckpt: expected a checkpoint written by main.py.*resume from another"):
        io.load_checkpoint(path, weights_only=False)
    io.save_checkpoint({"weight": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"cannot be read .*It may be half copied"):
        io.load_checkpoint(path)
    with pytest.raises(UserError, match=r"nothing.ckpt: there is no such checkpoint"):
        io.load_checkpoint(tmp_path / "nothing.ckpt")


def test_eight_bit_optimiser_states_are_resumed(tmp_path):
    optim = pytest.importorskip("torchao.optim")
    weight = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = optim.AdamW8bit([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state[weight]["exp_avg"]
    assert _tensor_bytes(state) < 1.2 * weight.numel() < state.nbytes, "what it really takes"
    io = AtomicCheckpointIO()
    io.save_checkpoint(optimizer.state_dict(), tmp_path / "last.ckpt")
    again = io.load_checkpoint(tmp_path / "last.ckpt")["state"][0]["exp_avg"]
    assert torch.equal(again.codes, state.codes)


def test_last_checkpoint_every_so_many_steps_and_at_the_end(root, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="ldm"):
        data = ClipDataModule(str(root), frames=3, batch_size=2, num_workers=0)
        callback = LastCheckpoint(str(tmp_path), {"name": "toy"}, every_n_steps=3)
        pl.Trainer(
            max_steps=7, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[callback],
            enable_model_summary=False,
        ).fit(ToyModel(learning_rate=0.05), data)  # fmt: skip
    assert [record.args[1] for record in caplog.records if record.msg.startswith("saved")] == [3, 6, 7]
    checkpoint = read(last(tmp_path))
    assert checkpoint["config"] == {"name": "toy"} and checkpoint["global_step"] == 7
    with pytest.raises(UserError, match="every_n_steps of at least 1, found 0"):
        LastCheckpoint(str(tmp_path), {}, every_n_steps=0)


def test_sigusr1_saves_and_goes_on(root, tmp_path, caplog):
    model = ToyModel(learning_rate=0.05)
    model.at_batch = {2: lambda: os.kill(os.getpid(), signal.SIGUSR1)}
    with caplog.at_level(logging.INFO, logger="ldm"):
        fit(root, tmp_path, [], model=model, steps=5)
    assert [record.args[1] for record in caplog.records if record.msg.startswith("saved")] == [3, 5]


def test_ctrl_c_stops_and_a_second_one_at_once(root, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    model = ToyModel(learning_rate=0.05)
    model.at_batch = {2: lambda: os.kill(os.getpid(), signal.SIGINT)}
    with pytest.raises(StopRequested, match=r"stopped after step 3; saved .*last.ckpt"):
        fit(root, tmp_path / "once", [], model=model)
    assert read(last(tmp_path / "once"))["global_step"] == 3
    assert signal.getsignal(signal.SIGINT) is before

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    model = ToyModel(learning_rate=0.05)
    model.at_batch = {2: twice}
    with pytest.raises(SystemExit):
        fit(root, tmp_path / "twice", [], model=model)
    assert not last(tmp_path / "twice").exists()
    signal.signal(signal.SIGINT, before)


def test_nothing_is_saved_before_the_first_step(root, tmp_path):
    def mistake():
        raise UserError("no")

    model = ToyModel(learning_rate=0.05)
    model.at_batch = {0: mistake}
    with pytest.raises(UserError):
        fit(root, tmp_path, [], model=model)
    assert not last(tmp_path).exists()


def test_nothing_is_written_in_a_dry_run(root, tmp_path):
    fit(root, tmp_path, [], fast_dev_run=True)
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


# ---- reports


def test_memory_by_kind(root, tmp_path, caplog):
    model = ToyModel(learning_rate=0.05)
    with caplog.at_level(logging.INFO, logger="ldm"):
        logger = TensorBoardLogger(tmp_path, name="", version="tensorboard")
        fit(root, tmp_path, [MemoryReport(), WeightAverage()], model=model, logger=logger, accumulate_grad_batches=2)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("memory")]
    assert [line.split(",")[0] for line in lines] == ["memory before the first step", "memory after the first step"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    trained = sum(weight.nbytes for weight in model.head.parameters()) / 2**20
    frozen = sum(weight.nbytes for weight in model.frozen.parameters()) / 2**20
    values = {name: [event.value for event in events.Scalars(f"memory/{name}")] for name in (
        "weights_trained", "weights_frozen", "gradients", "optimiser_states", "average", "peak"
    )}  # fmt: skip
    assert values["weights_trained"] == pytest.approx([trained, trained])
    assert values["weights_frozen"] == pytest.approx([frozen, frozen])
    assert values["average"] == pytest.approx([trained, trained])
    for name in ("gradients", "optimiser_states"):
        assert values[name] == pytest.approx([0, trained]), name
    assert 50 < values["peak"][1] < 100_000


def test_progress_of_a_model_that_returns_no_loss(root, tmp_path, caplog):
    class Quiet(ToyModel):
        def __init__(self):
            super().__init__(learning_rate=0.01)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.log("train/l1", 0.25, prog_bar=True, batch_size=len(batch))
            self.optimizers().step(lambda: self.loss(batch))

    with caplog.at_level(logging.INFO, logger="ldm"):
        fit(root, tmp_path, [ProgressLines(every_seconds=0)], model=Quiet(), steps=3)
    assert any(message.startswith("step 2/3, epoch 0, train/l1 0.2500, ") for message in caplog.messages)
    assert read(last(tmp_path))["global_step"] == 3


def test_progress_in_lines(root, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="ldm"):
        fit(root, tmp_path, [ProgressLines(every_seconds=0)], steps=3, accumulate_grad_batches=2)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step")]
    assert len(lines) == 3 and lines[0].startswith("step 1/3, epoch 0, loss ")
    assert "left" in lines[0] and "/s" in lines[0]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="ldm"):
        fit(root, tmp_path, [ProgressLines(every_seconds=1000)], steps=5)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step")]
    assert [line.split(",")[0] for line in lines] == ["step 1/5", "step 5/5"], "the first and the last at least"
    with pytest.raises(UserError, match="every_seconds of at least 0"):
        ProgressLines(every_seconds=-1)


# ---- sample videos


class ToyVideoModel(ToyModel):
    """The toy with a network that denoises: to it, all noise is the head's bias times the caption."""

    def __init__(self):
        super().__init__(learning_rate=0.05)
        self.schedule, self.scale_factor = NoiseSchedule(), 0.5
        self.unet = torch.nn.Module()
        self.unet.scale = torch.nn.Parameter(torch.zeros(()))
        self.unet.forward = self.denoise
        self.modes = []

    def denoise(self, noisy, timesteps, context):
        self.modes.append((self.unet.training, torch.is_grad_enabled()))
        assert noisy.ndim == 5 and context.shape[1:] == tuple(CONTEXT_SHAPE)
        return noisy * 0.5 + self.unet.scale + 0.01 * context.mean()


@pytest.fixture
def encoders(monkeypatch):
    """Stand-ins for the two encoders, and how often each was loaded."""
    loaded = []

    class Text(torch.nn.Module):
        def encode(self, prompts):
            return torch.stack([torch.full(CONTEXT_SHAPE, float(len(prompt))) for prompt in prompts])

    class FirstStage(torch.nn.Module):
        def decode(self, latents):
            return torch.nn.functional.interpolate(latents, scale_factor=8).repeat(1, 2, 1, 1)[:, :3].tanh()

    def load_encoders(config):
        loaded.append("both")
        return FirstStage(), Text()

    def load_first_stage(source, node):
        loaded.append(source)
        return FirstStage()

    monkeypatch.setattr(videos, "load_encoders", load_encoders)
    monkeypatch.setattr(videos, "load_first_stage", load_first_stage)
    return loaded


CONFIG = {"model": {"params": {"first_stage_config": {"params": {}}, "ckpt_path": "sd.ckpt"}}}


def test_sample_videos_at_the_start_and_every_so_many_steps(root, tmp_path, encoders):
    callback = VideoLogger(
        CONFIG, str(tmp_path), ["a road", "fog"], every_n_steps=3, frames=6, steps=2, scale=2.0, sampler="ddim"
    )
    model, logger = ToyVideoModel(), TensorBoardLogger(tmp_path, name="", version="tensorboard")
    average = WeightAverage(decay=0.9)
    fit(root, tmp_path, [average, callback], model=model, logger=logger, accumulate_grad_batches=2)
    names = sorted(path.name for path in (tmp_path / "images" / "samples").iterdir())
    assert names == [
        "00_gs-000000_e-000000_b-000000.gif", "00_gs-000003_e-000000_b-000005.gif",
        "01_gs-000000_e-000000_b-000000.gif", "01_gs-000003_e-000000_b-000005.gif",
        "sheet_gs-000000_e-000000_b-000000.png", "sheet_gs-000003_e-000000_b-000005.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "images" / "samples" / names[0]) as gif:
        assert (gif.n_frames, gif.size) == (6, (16, 16))
    assert encoders == ["both", "sd.ckpt", "sd.ckpt"], "the text encoder once, the decoder each time"
    assert set(model.modes) == {(False, False)} and model.unet.training
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    images = events.Images("samples/00")
    assert [image.step for image in images] == [0, 3]
    assert images[0].encoded_image_string == (tmp_path / "images" / "samples" / names[0]).read_bytes()
    assert (images[0].width, images[0].height) == (16, 16)


def test_sample_videos_repeat_and_are_not_shown_at_resume(root, tmp_path, encoders):
    def callback(folder):
        return VideoLogger(CONFIG, str(folder), ["a road"], every_n_steps=4, steps=2, scale=1.0)

    for name in ("one", "two"):
        fit(root, tmp_path / name, [callback(tmp_path / name)], model=ToyVideoModel(), steps=5)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.gif")} for name in ("one", "two")
    )
    assert one == two and len(one) == 2
    again, checkpoint = callback(tmp_path / "one"), last(tmp_path / "one")
    fit(root, tmp_path / "one", [again], model=ToyVideoModel(), steps=6, resume=checkpoint)
    assert len(list((tmp_path / "one" / "images").rglob("*.gif"))) == 2


def test_video_settings_that_cannot_be(root, tmp_path, encoders):
    with pytest.raises(UserError, match=r"at least one prompt.*found 0 prompts"):
        VideoLogger(CONFIG, str(tmp_path), [])
    with pytest.raises(UserError, match="every_n_steps 0"):
        VideoLogger(CONFIG, str(tmp_path), ["x"], every_n_steps=0)
    with pytest.raises(UserError, match="frames 0"):
        VideoLogger(CONFIG, str(tmp_path), ["x"], frames=0)
    with pytest.raises(UserError, match=r"did you mean 'ddim'\?"):
        fit(root, tmp_path, [VideoLogger(CONFIG, str(tmp_path), ["x"], sampler="dim")], model=ToyVideoModel())
    with pytest.raises(UserError, match="steps: expected 1 to 999, found 0"):
        fit(root, tmp_path, [VideoLogger(CONFIG, str(tmp_path), ["x"], steps=0)], model=ToyVideoModel())
    with pytest.raises(UserError, match="ToyModel makes no videos"):
        fit(root, tmp_path, [VideoLogger(CONFIG, str(tmp_path), ["x"])])
