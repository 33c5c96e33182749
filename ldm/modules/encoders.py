"""The two frozen encoders of Stable Diffusion v1: the image autoencoder (first stage) and the CLIP text encoder.

The networks are diffusers' AutoencoderKL and transformers' CLIPTextModel; here they get CompVis's config keys,
tensor names and units. VQ autoencoders are here too. Training reads latents that were prepared once and builds none
of them. Nothing here opens a file of weights: see `ldm.checkpoint.encoders`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.errors import UserError
from ldm.modules.posterior import LOGVAR_BOUNDS
from ldm.modules.state_dicts import POSITION_IDS, account, as_convolution, first_stage_from_diffusers, text_name
from ldm.modules.tokenizer import find_tokenizer

# CLIP ViT-L/14's text half.
CLIP_VIT_L14 = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
DDCONFIG_KEYS = {"z_channels", "ch", "ch_mult", "num_res_blocks", "in_channels", "out_ch"}
# Keys of CompVis's config with one supported value.
DDCONFIG_FIXED = {"double_z": True, "attn_resolutions": [], "dropout": 0.0}


class FirstStage(nn.Module):
    """Base of the image autoencoders: a diffusers network under CompVis's names.

    downsampling: pixels along a side of a latent. num_channels: of the latents.
    """

    def __init__(self, network: nn.Module, downsampling: int, num_channels: int) -> None:
        super().__init__()
        self.network = network
        self.downsampling = downsampling
        self.num_channels = num_channels

    def compvis_state_dict(self) -> dict[str, Tensor]:
        """The tensors under CompVis's names (`encoder.*`, `decoder.*`, `quant_conv.*`, `post_quant_conv.*`, ...)."""
        state = self.network.state_dict()
        return {name: as_convolution(name, state[other]) for other, name in first_stage_from_diffusers(state).items()}

    def load_compvis_state_dict(self, tensors: Mapping[str, Tensor], where: str = "first stage") -> None:
        """Fill the network; raises `CheckpointError` unless names and shapes match exactly."""
        expected = self.compvis_state_dict()
        account(expected, tensors, where=where)
        with torch.no_grad():
            for name, tensor in expected.items():  # these share memory with the parameters
                tensor.copy_(tensors[name])

    def decoder_parts(self) -> list[Callable[[Tensor], Tensor]]:
        """The decoder as a sequence of functions: unscaled latents `b z h w` in, images `b c fh fw` out.

        The first works at the size of the latents; all but the first and the last double the size at their end.
        """
        decoder = self.network.decoder

        def first(latents: Tensor) -> Tensor:
            return decoder.mid_block(decoder.conv_in(self._into_decoder(latents)))

        def last(features: Tensor) -> Tensor:
            return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(decoder.up_blocks[-1](features))))

        return [first, *decoder.up_blocks[:-1], last]

    def _into_decoder(self, latents: Tensor) -> Tensor:
        return self.network.post_quant_conv(latents)

    def _encode(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 4 or any(size % self.downsampling for size in pixels.shape[-2:]):
            raise UserError(
                f"first stage: expected images b c h w with h and w multiples of {self.downsampling}, found shape "
                f"{tuple(pixels.shape)}"
            )
        return self.network.quant_conv(self.network.encoder(pixels))


class KLFirstStage(FirstStage):
    """The image autoencoder with a Gaussian latent, built from CompVis's config keys.

    ddconfig: `ch`, `ch_mult`, `num_res_blocks`, `z_channels`, `in_channels`, `out_ch` as in CompVis's config.
    embed_dim: channels of the latents, equal to `z_channels`.
    ckpt_path: kept as an attribute and not read; `ldm.checkpoint.encoders.fill_encoder` loads weights.
    """

    def __init__(self, ddconfig: Mapping[str, Any], embed_dim: int, ckpt_path: str | None = None) -> None:
        _check_ddconfig(ddconfig, DDCONFIG_FIXED)
        if embed_dim != ddconfig["z_channels"]:
            raise UserError(
                f"embed_dim: expected {ddconfig['z_channels']}, the same as ddconfig.z_channels, found {embed_dim}"
            )
        widths = [ddconfig["ch"] * mult for mult in ddconfig["ch_mult"]]
        network = AutoencoderKL(
            in_channels=ddconfig["in_channels"],
            out_channels=ddconfig["out_ch"],
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=ddconfig["num_res_blocks"],
            latent_channels=embed_dim,
        )
        super().__init__(network, 2 ** (len(widths) - 1), embed_dim)
        self.ckpt_path = ckpt_path

    def encode(self, pixels: Tensor) -> Tensor:
        """Images in [-1, 1] -> mean and log-variance of their latents, unclamped and unscaled.

        `b c h w`, h and w multiples of `downsampling`, -> `b 2z h/f w/f`. For a sample see `posterior`.
        """
        return self._encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents, unscaled, -> images, about [-1, 1]: `b z h w` -> `b c fh fw`."""
        return self.network.decoder(self._into_decoder(latents))


class VQFirstStage(FirstStage):
    """The image autoencoder of latent diffusion with a codebook, `vq-f4`, `vq-f8` and their like.

    Van den Oord et al. 2017, "Neural Discrete Representation Learning", as in Esser et al. 2021, "Taming Transformers".
    The quantiser is taming-transformers'. Latents are the encoder's continuous output; the decoder quantises them.

    ddconfig: as for `KLFirstStage`, with `double_z: false`; `attn_resolutions` are feature map sizes with attention,
        for images of `resolution` pixels.
    embed_dim, n_embed: width and number of the codebook vectors; the latents have `embed_dim` channels.
    ckpt_path: kept as an attribute and not read; `ldm.checkpoint.encoders.fill_encoder` loads weights.
    """

    def __init__(self, ddconfig: Mapping[str, Any], embed_dim: int, n_embed: int, ckpt_path: str | None = None) -> None:
        _check_ddconfig(ddconfig, {"double_z": False, "dropout": 0.0})
        resolution, attended = ddconfig.get("resolution", 256), ddconfig.get("attn_resolutions", ())
        _check_sizes("ddconfig.attn_resolutions", attended)
        for path, value in (("ddconfig.resolution", resolution), ("embed_dim", embed_dim), ("n_embed", n_embed)):
            _check_size(path, value)
        widths = [ddconfig["ch"] * mult for mult in ddconfig["ch_mult"]]
        attends = [resolution // 2**level in attended for level in range(len(widths))]
        network = VQModel(
            in_channels=ddconfig["in_channels"],
            out_channels=ddconfig["out_ch"],
            down_block_types=[f"{'Attn' if has else ''}DownEncoderBlock2D" for has in attends],
            up_block_types=[f"{'Attn' if has else ''}UpDecoderBlock2D" for has in reversed(attends)],
            block_out_channels=widths,
            layers_per_block=ddconfig["num_res_blocks"],
            latent_channels=ddconfig["z_channels"],
            vq_embed_dim=embed_dim,
            num_vq_embeddings=1,  # replaced
        )
        network.quantize = _quantizer(n_embed, embed_dim)
        super().__init__(network, 2 ** (len(widths) - 1), embed_dim)
        self.ckpt_path = ckpt_path

    def encode(self, pixels: Tensor) -> Tensor:
        """Images in [-1, 1] -> their latents before quantisation, unscaled, as moments: `b c h w` -> `b 2z h/f w/f`.

        The log-variance is -30, the lower bound: clips are stored in the format of `KLFirstStage`.
        """
        latents = self._encode(pixels)
        return torch.cat([latents, torch.full_like(latents, LOGVAR_BOUNDS[0])], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents, unscaled, -> images, about [-1, 1], through the codebook: `b z h w` -> `b c fh fw`."""
        return self.network.decoder(self._into_decoder(latents))

    def _into_decoder(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):  # the nearest vector depends on rounding
            # one by one: each needs much memory
            quantized = torch.cat([self.network.quantize(one[None].float())[0] for one in latents]).to(latents)
        return super()._into_decoder(quantized)


class CLIPTextEmbedder(nn.Module):
    """The CLIP text encoder, frozen: captions -> one vector per token.

    text_config: options of transformers' CLIPTextConfig that differ from CLIP ViT-L/14 (768 wide, 12 layers).
    tokenizer: a folder or vocabulary file to take the tokenizer from; None: see `tokenizer.find_tokenizer`.
    max_length: tokens per caption, including the start and end tokens; longer captions are truncated.
    ckpt_path: kept as an attribute and not read; `ldm.checkpoint.encoders.fill_encoder` loads weights.
    random_seed: draw random weights from this seed alone, for use without Stable Diffusion's: captions then have
        distinct vectors, but no meaning. None: the caller fills the network.
    """

    def __init__(
        self,
        text_config: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        max_length: int = 77,
        ckpt_path: str | None = None,
        random_seed: int | None = None,
    ) -> None:
        super().__init__()
        if ckpt_path is not None and random_seed is not None:
            raise UserError("text encoder: expected either ckpt_path or random_seed, found both. Leave one out.")
        config = _clip_config(text_config or {})
        if not 3 <= max_length <= config.max_position_embeddings:
            raise UserError(
                f"max_length: expected 3 to {config.max_position_embeddings} tokens (max_position_embeddings), found "
                f"{max_length}"
            )
        self.max_length = max_length
        self.tokenizer_path, self.ckpt_path = tokenizer, ckpt_path
        with torch.random.fork_rng(devices=[]):  # filled below or by the caller
            self.network = CLIPTextModel(config)
        self.network.requires_grad_(False).eval()
        if random_seed is not None:
            self._fill_at_random(torch.Generator().manual_seed(random_seed))

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """CLIP's tokenizer, searched for on first use; raises `UserError` where there is none."""
        tokenizer = find_tokenizer(self.tokenizer_path)
        num_tokens, num_vectors = len(tokenizer), self.network.config.vocab_size
        if num_tokens > num_vectors:
            raise UserError(
                f"text encoder: expected at least {num_tokens} vectors, one per token of the tokenizer, found "
                f"vocab_size {num_vectors}. Set text_config.vocab_size to {num_tokens}."
            )
        return tokenizer

    def train(self, mode: bool = True) -> CLIPTextEmbedder:
        """Stay in evaluation mode, also when the parent module trains."""
        return super().train(False)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Captions -> int64 token numbers `b max_length`, truncated and padded with the end token."""
        fit = {"truncation": True, "padding": "max_length", "max_length": self.max_length}
        return self.tokenizer(list(prompts), return_tensors="pt", **fit)["input_ids"]

    def truncated(self, prompt: str) -> str | None:
        """The end of `prompt` beyond `max_length` tokens, which is ignored; None where all of it fits."""
        tokens = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        room = self.max_length - 2
        if len(tokens["input_ids"]) <= room:
            return None
        return prompt[tokens["offset_mapping"][room][0] :]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Captions -> context, float32 `b n d` with n = max_length."""
        return self.encode_tokens(self.tokenize(prompts))

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Token numbers `b n` -> the last layer's output after its norm, float32 `b n d`. Padding is not masked."""
        return self.network(input_ids=tokens.to(self.network.device)).last_hidden_state.float()

    def compvis_state_dict(self) -> dict[str, Tensor]:
        """The tensors under CompVis's names (`text_model.*`), including the token positions of old files."""
        tensors = {text_name(name): tensor for name, tensor in self.network.state_dict().items()}
        return {POSITION_IDS: position_ids(self.network.config.max_position_embeddings)} | tensors

    def load_compvis_state_dict(self, tensors: Mapping[str, Tensor], where: str = "text encoder") -> None:
        """Fill the network from names with or without `text_model.`; `CheckpointError` unless every tensor fits."""
        expected = self.compvis_state_dict()
        found = {text_name(name): tensor for name, tensor in tensors.items()}
        account(expected, found, where=where, may_miss=lambda name: name == POSITION_IDS)
        with torch.no_grad():
            for name, tensor in expected.items():  # these share memory with the parameters
                if name != POSITION_IDS:
                    tensor.copy_(found[name])

    @torch.no_grad()
    def _fill_at_random(self, generator: torch.Generator) -> None:
        """Unit gain through every layer; drawn here, so a seed does not depend on library versions."""
        for name, weight in sorted(self.network.named_parameters()):
            if weight.ndim == 1:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                gain = 1.0 if "embedding" in name else weight.shape[1] ** -0.5
                weight.copy_(gain * torch.randn(weight.shape, generator=generator))


def position_ids(num_positions: int = 77) -> Tensor:
    """The buffer 0, 1, 2, ... beside CLIP's weights in Stable Diffusion's files: int64 `1 n`."""
    return torch.arange(num_positions)[None]


def _clip_config(options: Mapping[str, Any]) -> CLIPTextConfig:
    unknown = sorted(set(options) - set(CLIP_VIT_L14))
    if unknown:
        raise UserError(f"text_config: expected keys among {', '.join(CLIP_VIT_L14)}; found {', '.join(unknown)}")
    try:
        return CLIPTextConfig(**CLIP_VIT_L14 | dict(options))
    except Exception as error:  # transformers validates with errors of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(f"text_config: expected valid options of a CLIP text encoder ({reason})") from None


def _quantizer(n_embed: int, embed_dim: int) -> nn.Module:
    """taming-transformers' quantiser, whose codebook is `embedding.weight`, `n e`."""
    try:
        from taming.modules.vqvae.quantize import VectorQuantizer  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UserError(
            "first stage: a VQ autoencoder needs taming-transformers, which is not installed "
            f"({error}). Install it without its dependencies, which are not needed: "
            "pip install --no-deps taming-transformers"
        ) from None
    return VectorQuantizer(n_embed, embed_dim, beta=0.25)


def _check_ddconfig(ddconfig: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    known = DDCONFIG_KEYS | set(DDCONFIG_FIXED) | {"resolution"}
    missing, unknown = sorted(DDCONFIG_KEYS - set(ddconfig)), sorted(set(ddconfig) - known)
    if missing or unknown:
        raise UserError(
            f"ddconfig: expected the keys {', '.join(sorted(DDCONFIG_KEYS))}; missing: "
            f"{', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
        )
    for key, value in fixed.items():
        found = ddconfig.get(key, value)
        if (list(found) if isinstance(found, Sequence) and not isinstance(found, str) else found) != value:
            raise UserError(f"ddconfig.{key}: expected {value}, as in the published models, found {found}")
    for key in sorted(DDCONFIG_KEYS - {"ch_mult"}):
        _check_size(f"ddconfig.{key}", ddconfig[key])
    _check_sizes("ddconfig.ch_mult", ddconfig["ch_mult"], at_least=1)
    if ddconfig["ch"] % 32:
        raise UserError(f"ddconfig.ch: expected a multiple of 32 (groups of the norms), found {ddconfig['ch']}")


def _check_size(path: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{path}: expected a whole number above 0, found {value!r}")


def _check_sizes(path: str, values: Any, at_least: int = 0) -> None:
    is_list = isinstance(values, Sequence) and len(values) >= at_least
    if not is_list or not all(isinstance(one, int) and one > 0 for one in values):
        raise UserError(f"{path}: expected a list of whole numbers above 0, found {values!r}")
