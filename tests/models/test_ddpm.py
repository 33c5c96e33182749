"""One training step of the video network: what moves, what stays, and which draws it makes."""

import copy
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.data.clips import Batch
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentVideoDiffusion
from ldm.modules.attention import SpatialTransformer
from ldm.optim import build_optimizer, with_schedule
from tests.conftest import relative_error

UNET = {
    "target": "ldm.modules.unet.UNetModel",
    "params": {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": [2, 1],
        "channel_mult": [1, 2],
        "num_heads": 2,
        "context_dim": 16,
        "use_checkpoint": True,
    },
}
NOT_BUILT = {"target": "ldm.modules.encoders.KLFirstStage", "params": {}}
REFERENCE = {"temporal": True, "time_embed": True, "convolutions": True}


def make_model(**options) -> LatentVideoDiffusion:
    torch.manual_seed(0)
    options = {"trainable": REFERENCE, "learning_rate": 1e-3} | options
    model = LatentVideoDiffusion(UNET, NOT_BUILT, NOT_BUILT, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # away from zero start, where some gradients are zero for a good reason
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def make_batch(positions: list[int], frames: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(5)
    moments = torch.randn(16, frames, 8, 8, 8, generator=generator).half()
    context = torch.randn(16, 7, 16, generator=generator).half()
    fps = torch.full((len(positions),), 10.0)
    return Batch(moments[positions], context[positions], fps, positions, ["scene"] * len(positions))


def optimise(model: LatentVideoDiffusion, batch: Batch, precision: torch.dtype | None = None) -> None:
    optimizer = model.configure_optimizers()["optimizer"]
    with torch.autocast("cpu", precision, enabled=precision is not None):
        clean, noise, timesteps = model.draw(batch)
        loss = model.error(clean, noise, timesteps, batch.context.float()).mean()
    loss.backward()
    optimizer.step()


def in_transformer(model: LatentVideoDiffusion, name: str) -> bool:
    return any(
        name.startswith(f"{path}.") for path, part in model.named_modules() if isinstance(part, SpatialTransformer)
    )


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_one_step_moves_trained_weights_only(name):
    """With recomputation and bf16 on, as in the reference run."""
    model = make_model(optimizer={"name": name})
    before = copy.deepcopy(dict(model.named_parameters()))
    optimise(model, make_batch([0, 1]), torch.bfloat16)
    for key, parameter in model.named_parameters():
        frozen = in_transformer(model, key) and ".temporal." not in key
        assert parameter.requires_grad != frozen, key
        if frozen:
            assert parameter.grad is None, key
            assert torch.equal(parameter, before[key]), key
        else:
            assert parameter.grad.abs().sum() > 0, key
            assert not torch.equal(parameter, before[key]), key


@pytest.mark.parametrize(
    ("trainable", "moves"),
    [
        ({"temporal": True}, lambda name, inside: ".temporal." in name),
        ({"spatial_attention": True}, lambda name, inside: inside and ".temporal." not in name),
        ({"time_embed": True}, lambda name, inside: name.startswith("unet.time_embed.")),
        (
            {"convolutions": True},
            lambda name, inside: not inside and ".temporal." not in name and ".time_embed." not in name,
        ),
        (
            {"temporal": True, "output_blocks.3": False},
            lambda name, inside: ".temporal." in name and "output_blocks.3." not in name,
        ),
        ({"out": 1e-5}, lambda name, inside: name.startswith("unet.out.")),
    ],
)
def test_groups_are_trained_by_name(trainable, moves):
    model = make_model(trainable=trainable)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == moves(name, in_transformer(model, name)), name


def test_groups_have_their_own_learning_rates():
    model = make_model(trainable={"temporal": 1e-4, "convolutions": True}, learning_rate=1e-5)
    groups = {group["name"]: group for group in model.configure_optimizers()["optimizer"].param_groups}
    assert {name: group["initial_lr"] for name, group in groups.items()} == {"temporal": 1e-4, "convolutions": 1e-5}
    trained = sum(len(group["params"]) for group in groups.values())
    assert trained == sum(parameter.requires_grad for parameter in model.parameters())


def test_the_summary_counts_every_parameter():
    model = make_model(trainable={"temporal": 1e-4, "convolutions": True}, learning_rate=1e-5)
    summary = model.parameter_summary()
    assert "frozen: spatial_attention" in summary
    assert "trained: temporal" in summary
    assert "at 0.0001" in summary
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    total = sum(p.numel() for p in model.parameters()) / 1e6
    assert f"{trained:.1f} M of {total:.1f} M parameters are trained" in summary


def test_draws_depend_on_the_clip_not_on_the_batch():
    model = make_model()
    together = model.draw(make_batch([3, 8, 5]))
    for index, position in enumerate([3, 8, 5]):
        alone = model.draw(make_batch([position]))
        assert all(torch.equal(a[0], b[index]) for a, b in zip(alone, together, strict=True))


def test_draws_differ_between_clips_seeds_and_streams():
    batch = make_batch([3])
    noises = [
        make_model().draw(batch)[1],
        make_model().draw(make_batch([4]))[1],
        make_model(seed=24).draw(batch)[1],
        make_model().draw(batch, stream=1)[1],
    ]
    for index, first in enumerate(noises):
        for second in noises[index + 1 :]:
            assert torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].abs() < 0.15


def test_drawn_latents_have_the_posteriors_mean_and_spread():
    model = make_model(scale_factor=0.5)
    mean, deviation = 3.0, 2.0
    like = torch.ones(4, 5, 4, 32, 32)
    moments = torch.cat([mean * like, 2 * math.log(deviation) * like], dim=2)
    batch = Batch(moments.half(), torch.zeros(4, 7, 16), torch.ones(4), [0, 1, 2, 3], ["scene"] * 4)
    clean, noise, timesteps = model.draw(batch)
    assert clean.mean().item() == pytest.approx(0.5 * mean, abs=0.02)
    assert clean.std().item() == pytest.approx(0.5 * deviation, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert ((timesteps >= 0) & (timesteps < 1000)).all()


def test_small_batches_accumulate_to_the_large_one():
    gradients = []
    for batches in ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 1], [2, 3]]):
        model = make_model()
        for positions in batches:
            batch = make_batch(positions)
            loss = model.error(*model.draw(batch), batch.context.float()).mean()
            (loss / len(batches)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert relative_error(gradients[1], gradients[0]) <= 1e-5
    assert relative_error(gradients[2], gradients[0]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_it_overfits_one_clip(parameterization):
    model = make_model(parameterization=parameterization, trainable=REFERENCE | {"spatial_attention": True})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batch = make_batch([0], frames=3)
    clean, noise, _ = model.draw(batch)
    losses = []
    for _ in range(60):
        loss = model.error(clean, noise, torch.tensor([500]), batch.context.float()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_held_out_loss_is_logged_in_bands_and_repeatable():
    model, logged = make_model(), []
    model.log = lambda name, value, **_: logged.append((name, float(value)))
    for _ in range(2):
        with torch.no_grad():
            model.validation_step(make_batch([0, 1]), 0)
    assert logged[:10] == logged[10:]
    values = dict(logged[:10])
    for kind in ("loss", "velocity_error"):
        bands = [f"val/{kind}_t{band}" for band in ("000-249", "250-499", "500-749", "750-999")]
        assert values[f"val/{kind}"] == pytest.approx(sum(values[band] for band in bands) / 4)


def test_eight_bit_states_take_two_bytes_a_parameter():
    weight = torch.nn.Parameter(torch.randn(512, 512))
    optimizer = build_optimizer([{"params": [weight], "lr": 1e-3}], "adamw8bit")
    weight.grad = torch.randn(512, 512)
    optimizer.step()
    state = optimizer.state[weight]
    averages = (state["exp_avg"], state["exp_avg_sq"])
    num_bytes = sum(part.nbytes for value in averages for part in (value.codes, value.scale, value.qmap))
    assert num_bytes / weight.numel() <= 2.1


@pytest.mark.parametrize(
    ("steps", "expected"),
    [((4,), [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]), ((2, 4, 6), [1.0, 2.0, 2.0, 1.5, 1.0, 0.5])],
)
def test_the_learning_rate_warms_up_and_cools_down(steps: tuple[int, ...], expected: list[float]):
    optimizer = build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 2.0}])
    schedule, rates = with_schedule(optimizer, *steps)["lr_scheduler"]["scheduler"], []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == expected


@pytest.mark.parametrize("options", [{}, {"name": "adamw8bit"}, {"states_on": "host"}], ids=str)
@pytest.mark.parametrize("changed", [False, True])
def test_a_resumed_run_has_the_hyperparameters_of_its_config(options: dict[str, Any], changed: bool):
    def start(rate: float, total: int, **more: Any) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        weights = [torch.nn.Parameter(torch.ones(4096)) for _ in range(2)]
        groups = [{"params": [weights[0]], "lr": rate}, {"params": [weights[1]], "lr": rate / 4}]
        optimizer = build_optimizer(groups, **options, **more)
        return optimizer, with_schedule(optimizer, 4, 2, total)["lr_scheduler"]["scheduler"]

    optimizer, schedule = start(0.5, 6, weight_decay=0.1)
    for _ in range(5):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(4096)
        optimizer.step()
        schedule.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25, 0.0625], "one step from the end"
    later, rates = start(2.0, 12, weight_decay=0.3, betas=(0.5, 0.9)) if changed else start(0.5, 6, weight_decay=0.1)
    later.load_state_dict(optimizer.state_dict())
    rates.load_state_dict(schedule.state_dict())
    found = [tuple(float(value) for value in (g["lr"], g["weight_decay"], *g["betas"])) for g in later.param_groups]
    own = (0.3, 0.5, 0.9) if changed else (0.1, 0.9, 0.999)
    assert found == [(rate, *own) for rate in ((2.0, 0.5) if changed else (0.25, 0.0625))]
    assert rates.get_last_lr() == [rate for rate, *_ in found]
    rates.step()
    assert float(later.param_groups[0]["lr"]) == (2.0 if changed else 0.0)


def test_a_cooldown_longer_than_the_run_is_refused():
    model = make_model(cooldown_steps=10)
    model._trainer = SimpleNamespace(max_steps=9)
    with pytest.raises(UserError, match=r"cooldown_steps: expected at most lightning.trainer.max_steps, found 10 with"):
        model.configure_optimizers()
    model._trainer = SimpleNamespace(max_steps=10)
    assert model.configure_optimizers()["optimizer"].param_groups[0]["lr"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable": {"temporl": True}}, r"model.params.trainable.temporl: .* did you mean 'temporal'\?"),
        ({"trainable": {"temporal": False}}, "at least one group that is trained, found none"),
        ({"trainable": {"temporal": -1.0}}, "true, false or a learning rate above zero, found -1.0"),
        ({"ckpt_path": "nowhere.ckpt"}, "nowhere.ckpt: expected a checkpoint"),
    ],
)
def test_impossible_configs_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_model(**options)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"name": "adam"}, "expected one of adamw, adamw8bit, adamw4bit, found 'adam'"),
        ({"weight_decy": 0.1}, r"optimizer.weight_decy: .*did you mean 'weight_decay'\?"),
        ({"betas": 0.9}, "optimizer.betas: expected two numbers from 0 to below 1, found 0.9"),
        ({"weight_decay": "much"}, "optimizer.weight_decay: expected a number from 0, found 'much'"),
    ],
)
def test_impossible_optimizers_are_refused_before_training(optimizer, message):
    with pytest.raises(UserError, match=message):
        make_model(optimizer=optimizer)


def test_missing_torchao_is_an_error_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match="'adamw8bit' needs the package torchao"):
        make_model(optimizer={"name": "adamw8bit"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"frames": 5, "image_share": 0.2}, "data.params.image_share: expected 0, since only temporal layers"),
        ({"frames": 1}, "data.params.frames: expected at least 2, since only temporal layers are trained"),
    ],
)
def test_single_frames_cannot_train_temporal_layers_only(data, message):
    model = make_model(trainable={"temporal": True})
    options = {"precision": "32-true", "accumulate_grad_batches": 1, "gradient_clip_val": None, "world_size": 1}
    model._trainer = SimpleNamespace(datamodule=SimpleNamespace(**data), **options)
    with pytest.raises(UserError, match=message):
        model.setup("fit")
