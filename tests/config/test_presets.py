"""The small configs that are laid over the reference run: each trains, and asks for nothing that excludes another."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldm.config import check, load_config, to_container
from ldm.data.clips import Batch
from ldm.models.diffusion.ddpm import LatentVideoDiffusion

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = ["fit-8gb", "fit-12gb", "fit-24gb", "temporal-only", "long-64", "long-181"]
SMALL = [
    "model.params.ckpt_path=null", "model.params.unet_config.params.model_channels=32",
    "model.params.unet_config.params.num_res_blocks=1", "model.params.unet_config.params.channel_mult=[1]",
    "model.params.unet_config.params.attention_resolutions=[1]", "model.params.unet_config.params.context_dim=16",
]  # fmt: skip


def merged(preset: str, *overrides: str):
    return load_config([CONFIGS / "video-sd.yaml", CONFIGS / f"{preset}.yaml"], overrides)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains(preset):
    config = merged(preset, *SMALL)
    check(config)
    words = to_container(config)
    trainer = words["lightning"]["trainer"]
    model = LatentVideoDiffusion(**words["model"]["params"], learning_rate=1e-3)
    model.memory.check_run(trainer["precision"], trainer["accumulate_grad_batches"], trainer["gradient_clip_val"], 1)
    model._trainer = SimpleNamespace(max_steps=1)
    optimizer, frames = model.configure_optimizers()["optimizer"], min(words["data"]["params"]["frames"], 5)
    before = {name: model.stored_weights.full(weight).clone() for name, weight in model.named_parameters()}
    moments, context = torch.randn(1, frames, 8, 4, 4), torch.randn(1, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.batch_errors(Batch(moments, context, torch.full((1,), 10.0), [0], ["scene"]))[0].sum()
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    moved = {
        name
        for name, weight in model.named_parameters()
        if not torch.equal(model.stored_weights.full(weight), before[name])
    }
    assert "unet.out.2.weight" in moved if preset != "temporal-only" else all(".temporal." in name for name in moved)


def test_every_preset_is_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*PRESETS, "video-sd"}


def test_presets_are_small_and_change_only_memory_options():
    for preset in PRESETS:
        assert len((CONFIGS / f"{preset}.yaml").read_text().splitlines()) <= 30
    reference = to_container(load_config([CONFIGS / "video-sd.yaml"]))["model"]["params"]
    for preset in PRESETS:
        params = to_container(merged(preset))["model"]["params"]
        changed = {word for word, value in params.items() if value != reference[word]}
        assert changed <= {"memory", "trainable", "unet_config"}, preset
