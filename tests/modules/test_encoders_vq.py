"""The autoencoders with a codebook, against the recorded reference; with taming-transformers where it is installed."""

from __future__ import annotations

import builtins
import copy
import sys
from types import ModuleType

import pytest
import torch
from einops import rearrange
from omegaconf import OmegaConf
from torch import nn

from ldm.checkpoint import CheckpointError, load_first_stage, load_unet, outline_first_stage, read_checkpoint
from ldm.checkpoint.diffusers import write_diffusers
from ldm.checkpoint.encoders import fill_encoder
from ldm.checkpoint.names import FIRST_STAGE_PREFIX
from ldm.checkpoint.writing import write_full
from ldm.config import check_node
from ldm.config.compvis import translate_compvis
from ldm.errors import UserError
from ldm.modules.encoders import VQFirstStage
from ldm.modules.posterior import sample_posterior
from ldm.sampling.generator import ClipGenerator
from tests.conftest import fill_by_rule, relative_error
from tests.tiny_checkpoint import CONFIG, assert_same, video_state, write_bare

TARGET = "ldm.modules.encoders.VQFirstStage"
MODULE = "taming.modules.vqvae.quantize"
TINY = {"double_z": False, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [16], "dropout": 0.0}  # fmt: skip
# As published: vq-f4 and vq-f8 of latent diffusion.
F4 = {
    "embed_dim": 3,
    "n_embed": 8192,
    "ddconfig": TINY
    | {
        "z_channels": 3,
        "resolution": 256,
        "ch": 128,
        "ch_mult": [1, 2, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
    },
}
F8 = {"embed_dim": 4, "n_embed": 16384, "ddconfig": TINY | {
    "resolution": 256, "ch": 128, "ch_mult": [1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [32]}}  # fmt: skip


class NearestVector(nn.Module):
    """What taming-transformers' quantiser does, for machines without it."""

    def __init__(self, n_e: int, e_dim: int, beta: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_e, e_dim)

    def forward(self, z):
        flat = rearrange(z, "b c h w -> (b h w) c")
        nearest = torch.cdist(flat, self.embedding.weight).argmin(dim=1)
        return rearrange(self.embedding(nearest), "(b h w) c -> b c h w", h=z.shape[2], w=z.shape[3]), None, None


@pytest.fixture(params=["stand-in", "taming-transformers"])
def quantizer(request, monkeypatch):
    if request.param == "taming-transformers":
        pytest.importorskip(MODULE)
        return
    for index in range(1, 5):
        monkeypatch.setitem(sys.modules, ".".join(MODULE.split(".")[:index]), ModuleType(MODULE))
    sys.modules[MODULE].VectorQuantizer = NearestVector


def filled(first_stage):
    shapes = {name: one.shape for name, one in first_stage.compvis_state_dict().items()}
    first_stage.load_compvis_state_dict(fill_by_rule(shapes))
    return first_stage.eval()


@torch.no_grad()
def test_encoder_and_decoder_with_attention_golden(quantizer, goldens, golden_configs):
    config, golden = golden_configs["ae_attn"], {k: v for k, v in goldens("ae").items() if k.startswith("attn.")}
    words = config["ddconfig"] | {"double_z": False}
    # The recorded network has a Gaussian latent: its encoder gives two numbers where one with a codebook gives one.
    encoder = filled(VQFirstStage(words | {"z_channels": 2 * words["z_channels"]}, 2 * config["embed_dim"], 8))
    found = encoder.encode(golden["attn.x"]).chunk(2, dim=1)[0]
    assert relative_error(found, golden["attn.moments"]) < 2e-5
    decoder = filled(VQFirstStage(words, config["embed_dim"], golden["attn.z"][:, 0].numel()))
    decoder.network.quantize.embedding.weight.copy_(rearrange(golden["attn.z"], "b c h w -> (b h w) c"))
    assert relative_error(decoder.decode(golden["attn.z"]), golden["attn.dec"]) < 2e-5


@torch.no_grad()
def test_latents_are_quantised_when_they_are_decoded(quantizer):
    first_stage = filled(VQFirstStage(TINY, 4, 16))
    pixels = torch.rand(2, 3, 32, 16) * 2 - 1
    moments = first_stage.encode(pixels)
    assert moments.shape == (2, 8, 16, 8)
    latents, logvar = moments.chunk(2, dim=1)
    assert (logvar == -30).all()
    assert torch.equal(moments.half()[:, 4:], logvar.half())  # stored clips are float16
    drawn = sample_posterior(moments, torch.randn_like(latents))
    assert (drawn - latents).abs().max() < 5e-6
    codebook = first_stage.network.quantize.embedding.weight
    flat = rearrange(latents, "b c h w -> (b h w) c")
    nearest = codebook[((flat[:, None] - codebook) ** 2).sum(dim=-1).argmin(dim=1)]
    nearest = rearrange(nearest, "(b h w) c -> b c h w", b=2, h=16)
    assert (nearest - latents).abs().max() > 0.01
    assert relative_error(first_stage.decode(latents), first_stage.decode(nearest)) < 1e-5
    expected = first_stage.network.decoder(first_stage.network.post_quant_conv(nearest))
    assert relative_error(first_stage.decode(latents), expected) < 1e-5


@pytest.mark.parametrize(("words", "downsampling", "num_attentions"), [(F4, 4, 2), (F8, 8, 2 + 2 + 3)])
def test_names_of_the_published_ones(quantizer, words, downsampling, num_attentions):
    with torch.device("meta"):
        first_stage = VQFirstStage(**words)
    state = first_stage.compvis_state_dict()
    assert (first_stage.downsampling, first_stage.num_channels) == (downsampling, words["embed_dim"])
    assert state["quantize.embedding.weight"].shape == (words["n_embed"], words["embed_dim"])
    assert state["quant_conv.weight"].shape == (words["embed_dim"], words["ddconfig"]["z_channels"], 1, 1)
    queries = [name for name in state if name.endswith(".q.weight")]
    assert len(queries) == num_attentions
    assert all(state[name].ndim == 4 for name in queries)  # 1x1 convolutions, as CompVis has them
    places = {"encoder.mid.attn_1", "decoder.mid.attn_1"}
    if words is F8:
        places |= {f"encoder.down.3.attn.{i}" for i in range(2)} | {f"decoder.up.3.attn.{i}" for i in range(3)}
    assert {name.removesuffix(".q.weight") for name in queries} == places
    parts = {name.split(".")[0] for name in state}
    assert parts == {"encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"}


def test_from_a_file_of_its_own_and_out_of_a_checkpoint(quantizer, tmp_path):
    first_stage = filled(VQFirstStage(TINY, 4, 16))
    state = first_stage.compvis_state_dict()
    write_bare(state | {"loss.discriminator.main.0.weight": torch.zeros(1)}, tmp_path / "vq.ckpt")
    fill_encoder(again := VQFirstStage(TINY, 4, 16), tmp_path / "vq.ckpt")
    assert_same(again.compvis_state_dict(), state)
    with pytest.raises(CheckpointError, match=r"1 of another shape: quantize.embedding.weight"):
        fill_encoder(VQFirstStage(TINY, 4, 32), tmp_path / "vq.ckpt")
    config = copy.deepcopy(CONFIG)
    node = {"target": TARGET, "params": {"ddconfig": TINY, "embed_dim": 4, "n_embed": 16}}
    config["model"]["params"]["first_stage_config"] = node
    full = {name: one for name, one in video_state().items() if not name.startswith(FIRST_STAGE_PREFIX)}
    full |= {FIRST_STAGE_PREFIX + name: one for name, one in state.items()}
    torch.save({"state_dict": full, "config": config}, tmp_path / "last.ckpt")
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")  # a stranger's config may name this class too
    assert_same(load_first_stage(checkpoint).compvis_state_dict(), state)
    generator = ClipGenerator(checkpoint)
    assert (generator.num_channels, generator.downsampling) == (4, 2)
    write_full(checkpoint, tmp_path / "full.safetensors")
    assert_same(load_first_stage(tmp_path / "full.safetensors").compvis_state_dict(), state)
    notes = write_diffusers(checkpoint, tmp_path / "out")
    assert "the image autoencoder was left out: diffusers' Stable Diffusion takes none with a codebook" in notes
    assert not (tmp_path / "out" / "vae").exists()
    load_unet(tmp_path / "out")


def test_outline_takes_no_memory(quantizer):
    outline = outline_first_stage({"target": TARGET, "params": F8})
    assert all(one.is_meta for one in outline.compvis_state_dict().values())


def test_the_published_config(quantizer):
    config = OmegaConf.create(
        {
            "model": {
                "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
                "params": {
                    "first_stage_config": {
                        "target": "ldm.models.autoencoder.VQModelInterface",
                        "params": F4 | {"lossconfig": {"target": "torch.nn.Identity"}},
                    }
                },
            }
        }
    )
    node = OmegaConf.to_container(translate_compvis(config))["model"]["params"]["first_stage_config"]
    assert node == {"target": TARGET, "params": F4}
    check_node(node, "model.params.first_stage_config")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"double_z": True}, r"ddconfig.double_z: expected False, as in .*, found True"),
        ({"attn_resolutions": 16}, r"ddconfig.attn_resolutions: expected a list of whole numbers above 0, found 16"),
        ({"resolution": "x"}, r"ddconfig.resolution: expected a whole number above 0, found 'x'"),
        ({"ch": 40}, r"ddconfig.ch: expected a multiple of 32"),
        ({"chh": 3}, r"unknown: chh"),
    ],
)
def test_words_that_will_not_do(quantizer, change, message):
    with pytest.raises(UserError, match=message):
        VQFirstStage(TINY | change, 4, 16)


def test_sizes_that_will_not_do(quantizer):
    for words in ({"embed_dim": 0, "n_embed": 16}, {"embed_dim": 4, "n_embed": 0}):
        with pytest.raises(UserError, match=r"(embed_dim|n_embed): expected a whole number above 0, found 0"):
            VQFirstStage(TINY, **words)
    with pytest.raises(UserError, match=r"multiples of 2, found shape \(1, 3, 31, 32\)"):
        VQFirstStage(TINY, 4, 16).encode(torch.zeros(1, 3, 31, 32))


def test_without_taming_transformers_it_says_what_to_install(monkeypatch):
    honest = builtins.__import__

    def without(name, *rest):
        if name.startswith("taming"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return honest(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs taming-transformers, .*: pip install --no-deps taming-transformers$"):
        VQFirstStage(TINY, 4, 16)
