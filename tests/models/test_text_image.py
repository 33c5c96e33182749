"""The small CLIP: it learns to separate styles, resumes exactly, and its file is a text encoder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ldm.checkpoint.encoders import fill_encoder
from ldm.config import build, check, load_config, to_container
from ldm.data.frames import FrameBatch
from ldm.data.world.frames import DriveFrameDataModule
from ldm.errors import UserError
from ldm.models.text_image import TextImageModel, contrastive_loss, with_stray_words
from ldm.modules.encoders import CLIPTextEmbedder
from ldm.modules.frame_tower import FrameTower
from tests.models.training import SaveAt, make_trainer

CONFIG = Path(__file__).parents[2] / "configs" / "drive" / "text.yaml"
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LOOKS = ["snow", "night"]
END = 49407


def make_model(**options) -> TextImageModel:
    torch.manual_seed(0)
    rates = {"learning_rate": 1e-3, "warmup_steps": 2, "cooldown_steps": 8}
    return TextImageModel(**{"text_config": SMALL} | rates | options)


def make_data() -> DriveFrameDataModule:
    return DriveFrameDataModule(looks=LOOKS, size=16, batch_size=2, val_frames=16)


def test_training_separates_styles_and_the_file_is_a_text_encoder(tmp_path):
    model = make_model(config={"model": {"target": "ldm.models.text_image.TextImageModel"}})
    trainer = make_trainer(tmp_path, 40)
    trainer.fit(model, data := make_data())
    assert trainer.validate(model, data, verbose=False)[0]["val/retrieval"] > 0.8
    trainer.save_checkpoint(path := tmp_path / "text.ckpt")
    fill_encoder(encoder := CLIPTextEmbedder(SMALL, max_length=32), path)
    tokens = encoder.tokenize(["a snowy road", "night"])
    with torch.no_grad():
        expected = model.text.network(input_ids=tokens).last_hidden_state
    assert torch.equal(encoder.encode_tokens(tokens), expected)
    assert not torch.equal(expected, make_model().text.encode_tokens(tokens))


def test_a_resumed_run_equals_the_straight_one(tmp_path):
    straight, resumed = (make_model(stray_words=0.5, cooldown_steps=2) for _ in range(2))
    trainer = make_trainer(tmp_path, 4, callbacks=[SaveAt(2, tmp_path / "half.ckpt")])
    trainer.fit(straight, make_data())
    make_trainer(tmp_path, 4).fit(resumed, make_data(), ckpt_path=tmp_path / "half.ckpt")
    state = resumed.state_dict()
    for name, value in straight.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_every_weight_of_both_networks_is_trained():
    model, batch = make_model(), make_data().train_frames[0]
    contrastive_loss(
        model.embed_frames(batch.pixels.repeat(2, 1, 1, 1) * torch.tensor([1.0, 0.5])[:, None, None, None]),
        model.embed_text(model.text.tokenize(["snow", "a drive at night"])),
        ["snow", "a drive at night"],
        model.log_scale.exp(),
    ).backward()
    silent = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert silent == []


def test_the_loss_of_known_similarities():
    frames, texts = torch.eye(2), torch.eye(2)
    expected = -math.log(math.exp(3) / (math.exp(3) + 1))
    assert contrastive_loss(frames, texts, ["a", "b"], 3.0).item() == pytest.approx(expected, rel=1e-5)
    same = contrastive_loss(frames, texts, ["a", "a"], 3.0).item()  # both captions are right
    assert same == pytest.approx(expected + 1.5, rel=1e-5)
    alike = F.normalize(torch.ones(2, 2), dim=-1)
    assert contrastive_loss(alike, texts, ["a", "a"], 3.0).item() == pytest.approx(math.log(2), rel=1e-5)


def test_stray_words_are_inserted_by_seed_only():
    tokens = torch.tensor([[49406, 1, 2, 3, END, END, END, END]] * 3)
    seeds = [(0, place) for place in range(3)]
    changed = with_stray_words(tokens, END, 1.0, seeds)
    assert torch.equal(changed[1:], with_stray_words(tokens[1:], END, 1.0, seeds[1:]))
    assert torch.equal(with_stray_words(tokens, END, 0.0, seeds), tokens)
    for row in changed.tolist():
        words = row[1 : row.index(END)]
        inserted = [word for word in words if word not in (1, 2, 3)]
        assert row[0] == 49406 and [word for word in words if word in (1, 2, 3)] == [1, 2, 3]
        assert 1 <= len(inserted) <= 3 and max(inserted) < END - 1


def test_stray_words_leave_room_for_the_end():
    full = torch.tensor([[49406, 1, 2, 3, END]])
    changed = with_stray_words(full, END, 1.0, [(0, 0)])
    assert changed.shape == full.shape and changed[0, -1] == END and changed[0, -2] < END


def test_the_frame_tower_accepts_any_size_and_depends_on_colour():
    torch.manual_seed(0)
    tower = FrameTower()
    large = F.interpolate(torch.rand(2, 3, 8, 8) * 2 - 1, (64, 64))
    enlarged = F.interpolate(large, (128, 192))
    assert tower(large).shape == (2, tower.width) == (2, 128)
    assert torch.cosine_similarity(tower(large), tower(enlarged)).min() > 0.98
    assert not torch.allclose(tower(large), tower(large.flip(1)), atol=1e-3)


def test_the_config_builds_and_every_key_is_read():
    config = load_config([CONFIG], [])
    check(config)
    node = to_container(config)["model"]
    model = build({"target": node["target"], "params": node["params"]}, "model")
    assert model.text.max_length == 32 and model.text.network.config.hidden_size == 64


def test_batches_without_captions_are_refused():
    batch = FrameBatch(torch.zeros(2, 3, 16, 16), [0, 1], rates=[1, 1])
    with pytest.raises(UserError, match=r"frames with captions, found FrameBatch; use .*DriveFrameDataModule"):
        make_model().training_step(batch, 0)


def test_a_share_of_stray_words_out_of_range_is_refused():
    with pytest.raises(UserError, match="stray_words: expected a share, 0 to 1, found 2"):
        make_model(stray_words=2)
