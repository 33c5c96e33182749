"""The image autoencoder, the text encoder, its tokenizer and the posterior, against the recorded reference."""

from __future__ import annotations

import gzip
import json
from copy import deepcopy
from importlib import metadata

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoint.encoders import fill_encoder
from ldm.checkpoint.reading import CheckpointError
from ldm.errors import UserError
from ldm.modules import tokenizer as tokenizer_module
from ldm.modules.encoders import CLIPTextEmbedder, KLFirstStage
from ldm.modules.posterior import kl, posterior_mean, sample_posterior, split_moments
from ldm.modules.tokenizer import find_tokenizer
from tests.conftest import fill_by_rule, relative_error

pytestmark = pytest.mark.numeric

TOLERANCE = 2e-5
TINY_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def first_stage(golden_configs):
    config = golden_configs["ae_sd"]
    first_stage = KLFirstStage(config["ddconfig"], config["embed_dim"])
    first_stage.load_compvis_state_dict(fill_by_rule({n: t.shape for n, t in first_stage.compvis_state_dict().items()}))
    return first_stage.eval()


@pytest.fixture(scope="module")
def text_encoder():
    return CLIPTextEmbedder(TINY_TEXT, random_seed=0)


def golden_text_weights(encoder):
    shapes = {name: tensor.shape for name, tensor in encoder.compvis_state_dict().items() if "position_ids" not in name}
    return fill_by_rule(shapes)


def test_first_stage_has_the_names_of_compvis(first_stage):
    state = first_stage.compvis_state_dict()
    assert len(state) == 248
    assert sum(tensor.numel() for tensor in state.values()) == 5252487
    assert state["encoder.mid.attn_1.q.weight"].shape == (128, 128, 1, 1)
    assert first_stage.downsampling == 8


@torch.no_grad()
@pytest.mark.parametrize("case", ["sd.", "sd.rect.", "sd.small."])
def test_first_stage_golden(first_stage, goldens, case):
    golden = {name: tensor.double() for name, tensor in goldens("ae").items() if name.startswith(case)}
    first_stage = deepcopy(first_stage).double()  # in float32, kernels of processors differ by more than the tolerance
    moments = first_stage.encode(golden[case + "x"])
    assert relative_error(moments, golden[case + "moments"]) < TOLERANCE
    assert relative_error(first_stage.decode(golden[case + "z"]), golden[case + "dec"]) < TOLERANCE
    if case + "mean" in golden:
        mean, logvar = split_moments(moments)
        assert relative_error(mean, golden[case + "mean"]) < TOLERANCE
        assert relative_error(logvar, golden[case + "logvar"]) < TOLERANCE
        assert relative_error(first_stage.decode(mean), golden[case + "dec_of_mean"]) < TOLERANCE


def test_posterior_golden(goldens):
    golden = goldens("ae")
    moments = golden["gauss.moments"]
    mean, logvar = split_moments(moments)
    assert moments.chunk(2, dim=1)[1].abs().max() > 30  # the clamp is put to use
    torch.testing.assert_close(logvar, golden["gauss.logvar"], rtol=0, atol=0)
    torch.testing.assert_close(posterior_mean(moments), golden["gauss.mean"], rtol=0, atol=0)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample_posterior(moments, noise), golden["gauss.mean"] + golden["gauss.std"] * noise)
    torch.testing.assert_close(kl(golden["gauss.p3_moments"]), golden["gauss.p3_kl"])


def test_posterior_of_clips_and_wrong_channels(goldens):
    moments = goldens("ae")["gauss.moments"]
    clip = moments[None].expand(3, -1, -1, -1, -1)  # b t c h w
    assert kl(clip).shape == (3, 2)
    torch.testing.assert_close(posterior_mean(clip)[1], posterior_mean(moments))
    with pytest.raises(UserError, match=r"even number of channels.*\(1, 3, 2, 2\)"):
        split_moments(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z_channels": 5}, "embed_dim: expected 5"),
        ({"ch": 40}, "ddconfig.ch: expected a multiple of 32"),
        ({"ch": "x"}, "ddconfig.ch: expected a whole number above 0, found 'x'"),
        ({"ch_mult": 3}, "ddconfig.ch_mult: expected a list of whole numbers above 0, found 3"),
        ({"ch_mult": []}, r"ddconfig.ch_mult: expected a list of whole numbers above 0, found \[\]"),
        ({"attn_resolutions": [8]}, r"ddconfig.attn_resolutions: expected \[\]"),
        ({"double_z": False}, "ddconfig.double_z: expected True"),
        ({"chh": 3}, "unknown: chh"),
    ],
)
def test_first_stage_refuses_other_architectures(golden_configs, change, message):
    with pytest.raises(UserError, match=message):
        KLFirstStage(golden_configs["ae_sd"]["ddconfig"] | change, 4)


def test_first_stage_names_missing_words():
    with pytest.raises(UserError, match="missing: ch_mult, in_channels, num_res_blocks, out_ch, z_channels"):
        KLFirstStage({"ch": 32}, 4)


def test_first_stage_refuses_odd_sizes(first_stage):
    with pytest.raises(UserError, match=r"multiples of 8, found shape \(1, 3, 30, 32\)"):
        first_stage.encode(torch.zeros(1, 3, 30, 32))


def test_first_stage_is_filled_from_a_file(first_stage, golden_configs, tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in first_stage.compvis_state_dict().items()}
    save_file(tensors, tmp_path / "kl.safetensors")
    config = golden_configs["ae_sd"]
    again = KLFirstStage(config["ddconfig"], config["embed_dim"], ckpt_path="nowhere.ckpt")  # data, not read
    assert fill_encoder(again, tmp_path / "kl.safetensors").path == tmp_path / "kl.safetensors"
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.compvis_state_dict().items())
    assert all(parameter.requires_grad for parameter in again.parameters())  # it may be trained further


def test_first_stage_lists_what_does_not_fit(first_stage):
    tensors = dict(first_stage.compvis_state_dict())
    del tensors["quant_conv.bias"]
    tensors["quant_conv.weight"] = torch.zeros(2, 2, 1, 1)
    tensors["stranger"] = torch.zeros(1)
    message = r"1 missing: quant_conv.bias; 1 unexpected: stranger; 1 of another shape: quant_conv.weight \(expected"
    with pytest.raises(CheckpointError, match=message):
        first_stage.load_compvis_state_dict(tensors)


def test_text_golden(goldens, golden_configs):
    golden = goldens("clip_text")
    encoder = CLIPTextEmbedder(golden_configs["clip_text"])
    encoder.load_compvis_state_dict(golden_text_weights(encoder))
    assert relative_error(encoder.encode_tokens(golden["ids"]), golden["last_hidden_state"]) < TOLERANCE


def test_text_both_spellings_load_and_the_old_one_is_written(goldens, golden_configs):
    golden = goldens("clip_text")
    encoder = CLIPTextEmbedder(golden_configs["clip_text"])
    weights = golden_text_weights(encoder)
    assert all(name.startswith("text_model.") for name in encoder.compvis_state_dict())
    assert encoder.compvis_state_dict()["text_model.embeddings.position_ids"].shape == (1, 77)
    encoder.load_compvis_state_dict({name.removeprefix("text_model."): value for name, value in weights.items()})
    assert relative_error(encoder.encode_tokens(golden["ids"]), golden["last_hidden_state"]) < TOLERANCE


def test_text_loading_nothing_is_an_error(golden_configs):
    encoder = CLIPTextEmbedder(golden_configs["clip_text"])
    with pytest.raises(CheckpointError, match=r"36 missing: text_model.embeddings.token_embedding.weight"):
        encoder.load_compvis_state_dict({})


def test_text_is_frozen_and_stays_in_evaluation_mode(text_encoder):
    assert not any(parameter.requires_grad for parameter in text_encoder.parameters())
    torch.nn.Sequential(text_encoder).train()
    assert not any(module.training for module in text_encoder.modules())


def test_random_text_encoder_depends_on_its_seed_alone(text_encoder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torch.rand(0)
    again, other = CLIPTextEmbedder(TINY_TEXT, random_seed=0), CLIPTextEmbedder(TINY_TEXT, random_seed=1)
    assert torch.equal(torch.rand(3), expected)  # the global generator was left alone
    prompts = ["a road", "a town", ""]
    context = text_encoder.encode(prompts)
    assert torch.equal(again.encode(prompts), context)
    assert not torch.equal(other.encode(prompts), context)
    assert context.shape == (3, 77, 16) and context.dtype == torch.float32
    # Frozen random weights must still tell captions apart.
    distances = torch.cdist(context.flatten(1), context.flatten(1)) / context[0].norm()
    assert distances[~torch.eye(3, dtype=bool)].min() > 0.05


def test_text_argument_errors(golden_configs):
    with pytest.raises(UserError, match="either ckpt_path or random_seed, found both"):
        CLIPTextEmbedder(TINY_TEXT, ckpt_path="x", random_seed=0)
    with pytest.raises(UserError, match=r"max_length: expected 3 to 77 tokens.*found 78"):
        CLIPTextEmbedder(TINY_TEXT, max_length=78)
    with pytest.raises(UserError, match=r"text_config: expected keys among .* found width"):
        CLIPTextEmbedder({"width": 3})
    with pytest.raises(UserError, match=r"expected at least 49408 vectors.*found vocab_size 64"):
        CLIPTextEmbedder(golden_configs["clip_text"]).encode(["a cat"])


def test_tokens_of_known_words(text_encoder):
    tokens = text_encoder.tokenize(["a photo of a cat", ""])
    assert tokens.shape == (2, 77)
    assert tokens[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (tokens[0, 7:] == 49407).all() and (tokens[1, 1:] == 49407).all()


def test_long_captions_are_cut_and_it_is_told_where(text_encoder):
    prompt = " ".join(["a"] * 74 + ["Quiet", "road,", "rain"])
    assert text_encoder.truncated(prompt) == "road, rain"
    assert text_encoder.truncated(" ".join(["a"] * 75)) is None
    assert text_encoder.truncated("") is None
    assert text_encoder.tokenize([prompt])[0, -1] == 49407  # the end mark is kept
    same = text_encoder.encode([prompt, prompt.removesuffix("road, rain")])
    assert torch.equal(same[0], same[1])


def test_short_max_length():
    encoder = CLIPTextEmbedder(TINY_TEXT, max_length=8, random_seed=0)
    assert encoder.encode(["a photo of a cat"]).shape == (1, 8, 16)
    assert encoder.truncated("a photo of a cat on a mat") == "on a mat"[3:]


@pytest.fixture
def no_open_clip(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tokenizer_module.metadata, "distribution", missing)


def test_no_tokenizer_anywhere(no_open_clip, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = r"three places: no folder was given.*open_clip_torch is not installed.*hub did not give.*pip install"
    with pytest.raises(UserError, match=message):
        find_tokenizer()


def test_tokenizer_from_folder_and_from_file(no_open_clip, tmp_path):
    package = metadata.Distribution.from_name("open_clip_torch")
    packaged = package.locate_file(f"open_clip/{tokenizer_module.VOCABULARY}")
    tokenizer = find_tokenizer(packaged)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    merges = gzip.decompress(packaged.read_bytes()).decode().split("\n")[1 : tokenizer_module.NUM_MERGES + 1]
    (folder / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    for path in (folder, tmp_path):  # the folder itself, or a pipeline's folder around it
        assert find_tokenizer(path)("A Photo, of a cat!")["input_ids"] == tokenizer("A Photo, of a cat!")["input_ids"]


def test_broken_tokenizers(tmp_path):
    with pytest.raises(UserError, match=r"expected a folder with vocab.json and merges.txt.*found neither"):
        find_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=r"expected CLIP's 49,408 words|cannot be read"):
        find_tokenizer(tmp_path)
    (tmp_path / "short.txt.gz").write_bytes(gzip.compress(b"header\na b\n"))
    with pytest.raises(UserError, match="with 49,408 words, found"):
        find_tokenizer(tmp_path / "short.txt.gz")
    (tmp_path / "text.txt.gz").write_text("not gzip")
    with pytest.raises(UserError, match="a file that cannot be read"):
        find_tokenizer(tmp_path / "text.txt.gz")
