"""Configs published for CompVis' Stable Diffusion v1: class names are translated, keys without effect dropped.

A key is dropped only where its value is what this project does anyway; any other value is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config.schema import ConfigError, fits, mapping_at

MODELS = ("ldm.models.diffusion.ddpm.LatentDiffusion", "ldm.models.diffusion.ddpm.LatentInpaintDiffusion")
TARGETS = {
    "unet_config": {"ldm.modules.diffusionmodules.openaimodel.UNetModel": "ldm.modules.unet.UNetModel"},
    "first_stage_config": {
        "ldm.models.autoencoder.AutoencoderKL": "ldm.modules.encoders.KLFirstStage",
        "ldm.models.autoencoder.VQModelInterface": "ldm.modules.encoders.VQFirstStage",
    },
    "cond_stage_config": {
        "ldm.modules.encoders.modules.FrozenCLIPEmbedder": "ldm.modules.encoders.CLIPTextEmbedder",
    },
}


def _anything(value: Any) -> bool:
    return True


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


# key -> whether this value may be dropped
DEAD_KEYS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "": {
        **dict.fromkeys(("first_stage_key", "cond_stage_key", "image_size", "channels", "concat_mode"), _anything),
        **dict.fromkeys(("log_every_t", "monitor", "clip_denoised", "cosine_s", "num_timesteps_cond"), _anything),
        "cond_stage_trainable": _one_of(False),
        "first_stage_trainable": _one_of(False),
        "conditioning_key": _one_of("crossattn", "hybrid"),
        "use_ema": _one_of(False),
        "scale_by_std": _one_of(False),
        "learn_logvar": _one_of(False),
        "load_only_unet": _one_of(False),
        "loss_type": _one_of("l2"),
        "beta_schedule": _one_of("linear"),
        "l_simple_weight": _one_of(1, 1.0),
        "original_elbo_weight": _one_of(0, 0.0),
        "v_posterior": _one_of(0, 0.0),
        "given_betas": _one_of(None),
        "finetune_keys": _one_of(None),
        "ignore_keys": _one_of([], None),
    },
    "unet_config": {
        "image_size": _anything,
        "use_spatial_transformer": _one_of(True),
        "legacy": _one_of(False),
        "conv_resample": _one_of(True),
        "dims": _one_of(2),
        "num_classes": _one_of(None),
        "n_embed": _one_of(None),
        "num_head_channels": _one_of(-1),
        "num_heads_upsample": _one_of(-1),
        **dict.fromkeys(
            ("use_fp16", "use_scale_shift_norm", "resblock_updown", "use_new_attention_order"), _one_of(False)
        ),
    },
    "first_stage_config": {
        "monitor": _anything,
        "image_key": _anything,
        "lossconfig": _one_of(None, {"target": "torch.nn.Identity"}),
        "colorize_nlabels": _one_of(None),
        "ignore_keys": _one_of([], None),
    },
    "cond_stage_config": {
        "device": _anything,
        "version": _one_of("openai/clip-vit-large-patch14"),
    },
}
INSTEAD = {
    "use_ema": "the average of the weights is lightning.callbacks.average",
    "conditioning_key": "only text (crossattn) and the inpainting network's extra channels (hybrid) are supported",
}


def translate_compvis(config: DictConfig) -> DictConfig:
    """Rename the classes and drop the dead keys of a CompVis config; other configs are returned unchanged.

    Raises `ConfigError` with the YAML path for a dropped key with a value that is not supported.
    """
    model = config.get("model")
    if not isinstance(model, Mapping) or model.get("target") not in MODELS:
        return config
    tree = OmegaConf.to_container(config)
    tree["model"]["target"] = "ldm.models.diffusion.ddpm.LatentVideoDiffusion"
    params = dict(mapping_at("model.params", tree["model"].get("params")))
    scheduler = params.pop("scheduler_config", None)
    if scheduler is not None:
        params.setdefault("warmup_steps", _warmup_steps(scheduler))
    params = tree["model"]["params"] = _drop(params, "", "model.params")
    for part, targets in TARGETS.items():
        node = params.get(part)
        if isinstance(node, dict):
            if isinstance(node.get("target"), str):
                node["target"] = targets.get(node["target"], node["target"])
            path = f"model.params.{part}.params"
            node["params"] = _drop(mapping_at(path, node.get("params")), part, path)
    return OmegaConf.create(tree)


def _drop(params: Mapping[str, Any], part: str, path: str) -> dict[str, Any]:
    kept = {}
    for key, value in params.items():
        may_go = DEAD_KEYS[part].get(key)
        if may_go is None:
            kept[key] = value
        elif not may_go(value):
            hint = INSTEAD.get(key, "remove the key, or train with the original code")
            raise ConfigError(f"{path}.{key}: {value!r} is not supported; {hint}")
    return kept


def _warmup_steps(scheduler: Any) -> int:
    """The one learning-rate schedule of the published configs: linear warm-up, then constant."""
    path = "model.params.scheduler_config"
    scheduler = mapping_at(path, scheduler)
    params = mapping_at(f"{path}.params", scheduler.get("params"))
    steps, low, high = (params.get(key) for key in ("warm_up_steps", "f_min", "f_max"))
    is_linear = scheduler.get("target") == "ldm.lr_scheduler.LambdaLinearScheduler" and low == high
    if not is_linear or not fits(steps, Sequence[float]) or len(steps) != 1:
        raise ConfigError(f"{path}: expected a linear warm-up to a constant rate; use warmup_steps")
    return int(steps[0])
