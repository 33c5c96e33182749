"""Rows that a checkpoint makes for an evaluation: their clips, what lies on disk, and what the options ask for."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.data.world import FIRST_SEED, LOOKS, MOVING_LOOKS, STILL_LOOKS, choose_looks, unseen_scenes
from ldm.errors import UserError
from ldm.evaluation.clip_files import plan_rows
from ldm.experiments.evaluation_plan import EvaluationPlan, add_making_options, read_prompts, row_names, split_given
from ldm.experiments.sampled_rows import ALONE, SampledRows, WantedClip, autoencode, true_row
from ldm.modules.posterior import posterior_mean
from ldm.modules.unet import UNetModel
from ldm.sampling.generator import ClipGenerator
from ldm.sampling.record import read_record
from ldm.sampling.settings import ClipSettings
from ldm.video import from_uint8, read_metadata, read_video, to_uint8, write_mp4
from scripts import evaluate
from tests.conftest import fill_by_rule
from tests.scripts.test_txt2vid import training_config
from tests.tiny_checkpoint import UNET, image_state, video_state

CLIP = {"frames": 3, "fps": 4.0, "steps": 2, "scale": 1.0}
WANTED = [WantedClip(0, 0, "a snowy road"), WantedClip(1, 1, "a road at night")]


def save(path: Path, state: dict, **words: object) -> Path:
    config = training_config()
    config["model"]["params"]["unet_config"]["params"] |= words
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "config": config}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("rows") / "tiny.ckpt", video_state())


def generate(generator: ClipGenerator, settings, wanted: list[WantedClip], **options):
    seeds, prompts = [clip.seed for clip in wanted], [clip.prompt for clip in wanted]
    return generator.generate(settings, seeds, prompts=prompts, **options)


def count(total: list[int]):
    return lambda number=1: total.append(number)


def test_each_clip_of_a_batch_has_its_own_prompt_and_noise(checkpoint):
    generator, alone = ClipGenerator(checkpoint), ClipGenerator(checkpoint)
    settings = SampledRows(generator, "tiny", CLIP, Path("unused"), "").settings
    for one in (generator, alone):
        one.read_prompts([*(clip.prompt for clip in WANTED), ""])
    together = generate(generator, settings, WANTED)
    for clip, frames in zip(WANTED, together, strict=True):
        (same,) = alone.generate(type(settings)(**{**vars(settings), "prompt": clip.prompt}), [clip.seed])
        assert np.abs(frames.astype(int) - same).max() <= 1
    other = generate(generator, settings, [WantedClip(0, 0, "a road at night"), WANTED[1]])
    assert not np.array_equal(other[0], together[0])


def test_a_row_on_disk_is_not_made_again_unless_something_changed(checkpoint, tmp_path, monkeypatch):
    maker = SampledRows(ClipGenerator(checkpoint), "tiny", CLIP, tmp_path, "python evaluate.py")
    row = maker.sampled(WANTED, count([]))
    assert [path.name for path in row.files] == ["00000.mp4", "00001.mp4"] and not row.is_reference
    record = read_record(row.files[1])  # as txt2vid.py writes them: it can replay the clip
    assert record["clip"]["prompt"] == "a road at night" and record["seed"] == 1
    frames, fps = read_video(row.files[1])
    assert frames.shape == (3, 32, 48, 3) and fps == 4

    made, real = [], ClipGenerator.generate

    def generate_and_note(self, settings, seeds, chunk, prompts, images_only):
        made.append(list(zip(seeds, prompts, strict=True)))
        return real(self, settings, seeds, chunk, prompts=prompts, images_only=images_only)

    monkeypatch.setattr(ClipGenerator, "generate", generate_and_note)
    done: list[int] = []
    more = [*WANTED, WantedClip(2, 2, "a third road")]
    SampledRows(ClipGenerator(checkpoint), "tiny", CLIP, tmp_path, "another command").sampled(more, count(done))
    assert made == [[(2, "a third road")]] and done == [2, 1]
    row.files[0].write_bytes(b"damaged")
    SampledRows(ClipGenerator(checkpoint), "tiny", CLIP | {"steps": 3}, tmp_path, "").sampled(more, count([]))
    assert made[1] == [(clip.seed, clip.prompt) for clip in more]
    SampledRows(ClipGenerator(checkpoint), "tiny", CLIP | {"steps": 3}, tmp_path, "").sampled(more, count([]))
    assert len(made) == 2


def test_images_only_frames_do_not_depend_on_each_other(checkpoint):
    generator = ClipGenerator(checkpoint)
    generator.read_prompts(["a road"])
    latents, options = {}, {"height": 32, "width": 48, "fps": 4.0, "steps": 2, "scale": 1.0}
    for frames in (2, 3):
        settings = ClipSettings("a road", frames=frames, **options)
        for images_only in (False, True):
            made = generator.make_latents(settings, [3], prompts=["a road"], images_only=images_only)
            latents[frames, images_only] = made[:, :2]
    torch.testing.assert_close(latents[2, True], latents[3, True], rtol=0, atol=1e-4)
    assert not torch.allclose(latents[2, False], latents[3, False], atol=1e-2)
    assert not torch.allclose(latents[2, True], latents[2, False], atol=1e-2)


def test_true_clips_and_what_the_autoencoder_makes_of_them(checkpoint, tmp_path):
    scenes = unseen_scenes(("snow", "night"), 2)
    true = true_row(scenes, 3, (32, 48), 4.0, tmp_path, count([]))
    clip = scenes[1].draw(3, (32, 48), 4.0)
    assert np.abs(read_video(true.files[1])[0].astype(int) - clip.frames).mean() < 4  # an MP4 of them
    record = read_metadata(true.files[1])
    assert record["clip"]["look"] == "night" and record["clip"]["prompt"] in clip.captions
    maker = SampledRows(ClipGenerator(checkpoint), "tiny", CLIP, tmp_path, "")
    row = maker.autoencoded(true, count([]))
    frames = read_video(row.files[1])[0]
    assert frames.shape == clip.frames.shape and row.is_reference
    first_stage, source = maker.generator.first_stage, read_video(true.files[1])[0]
    with torch.no_grad():
        decoded = to_uint8(first_stage.decode(posterior_mean(first_stage.encode(from_uint8(source)))))
    assert np.abs(autoencode(maker.generator, source).astype(int) - decoded).max() <= 1
    assert np.corrcoef(decoded.mean(axis=3).flat, frames.mean(axis=3).flat)[0, 1] > 0.8  # an MP4 of its wild colours
    before = row.files[1].stat().st_mtime_ns
    maker.autoencoded(true, count([]))
    assert row.files[1].stat().st_mtime_ns == before


def test_scenes_are_those_that_nothing_is_trained_on():
    scenes = unseen_scenes(("snow", "night"), 3, first=5)
    assert [(scene.look, scene.seed - FIRST_SEED) for scene in scenes] == [("snow", 5), ("night", 6), ("snow", 7)]
    assert choose_looks("moving") == MOVING_LOOKS and choose_looks("still") == STILL_LOOKS
    assert choose_looks("all") == LOOKS and choose_looks("snow, rain,snow") == ("snow", "rain")


# the plan of an evaluation


def options(tmp_path: Path, *words: str, reference: tuple[str, ...] = (), frames: int | None = None) -> Namespace:
    parser = ArgumentParser()
    add_making_options(parser)
    reference = [Path(place) for place in reference]
    return Namespace(**vars(parser.parse_args(words)), frames=frames, out=tmp_path, reference=reference)


QUICK = ["--clips", "2", "--steps", "1", "--scale", "1", "--device", "cpu"]


def test_rows_of_a_checkpoint_and_the_procedural_world(checkpoint, tmp_path):
    words = options(tmp_path, *QUICK, "--looks", "snow", reference=("world",), frames=3)
    plan = EvaluationPlan(words, [checkpoint], None, "")
    done: list[int] = []
    plan.make(count(done))
    assert sum(done) == plan.num_clips == 8
    assert [(row.name, row.is_reference) for row in plan.rows] == [
        ("true, autoencoded", True), (ALONE, True), ("tiny", False),
    ]  # fmt: skip
    prompts = [read_metadata(path)["clip"]["prompt"] for path in plan.true.files]
    for row in plan.rows:
        assert [read_metadata(path)["clip"]["prompt"] for path in row.files] == prompts
        assert read_video(row.files[0])[0].shape == (3, 32, 48, 3)


def test_a_network_of_images_has_no_second_row(tmp_path):
    path = save(tmp_path / "image.ckpt", image_state(), temporal=False)
    plan = EvaluationPlan(options(tmp_path, *QUICK, frames=2), [path], None, "")
    plan.make(count([]))
    assert [row.name for row in plan.rows] == ["image"]
    assert plan.true is None


def test_given_prompts_need_no_rendering(checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text("# mine\nfirst road\n\nsecond road\n")
    words = ["--prompts", str(tmp_path / "prompts.txt"), "--alone", "0", "--clips", "3"]
    plan = EvaluationPlan(options(tmp_path, *QUICK, *words, frames=2), [checkpoint], None, "")
    plan.make(count([]))
    (row,) = plan.rows
    found = [read_metadata(path)["clip"]["prompt"] for path in row.files]
    assert found == ["first road", "second road", "first road"]
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == ["tiny-2-at-4"]


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys):
    words = {"fps_embedding": True}
    unet = UNetModel(**UNET, **words).state_dict()
    named = {f"model.diffusion_model.{name}": value.shape for name, value in unet.items() if ".fps." in name}
    path = save(tmp_path / "told.ckpt", video_state() | fill_by_rule(named), **words)
    common = ["--looks", "snow", "--frames", "3", "--H", "64", "--W", "64", "--reference", "world", "--rates", "2,4,8"]
    evaluate.main([str(path), *QUICK, *common, "--no-spoilt", "--out", str(tmp_path / "out")])
    printed = " ".join(capsys.readouterr().out.split())
    assert "against true flow" in printed and "motion against" in printed
    summary = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["name"] for row in summary["rows"]] == ["true", "true, autoencoded", ALONE, "told"]
    assert summary["rows"][3]["of_true"] and not summary["rows"][3]["is_reference"]
    assert summary["clips"] == {"num_frames": 3, "height": 64, "width": 64, "rate": 4.0}
    true, autoencoded = summary["true_flow"]
    assert true["error"]["mean"] < 0.5 * true["length"]["mean"] < autoencoded["error"]["mean"]
    assert [(its["name"], its["rates"]) for its in summary["rates"]] == [("told", [2, 4, 8]), ("true", [2, 4, 8])]


def test_what_is_a_checkpoint(tmp_path):
    for name in ("a.ckpt", "b.safetensors", "clip.mp4", "bundle/config.yaml", "videos/00000.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    given = [tmp_path / name for name in ("a.ckpt", "b.safetensors", "clip.mp4", "bundle", "videos")]
    checkpoints, videos = split_given(given)
    assert [path.name for path in checkpoints] == ["a.ckpt", "b.safetensors", "bundle"]
    assert [path.name for path in videos] == ["clip.mp4", "videos"]


def test_rows_are_called_by_their_runs():
    paths = [Path(f"/logs/{run}/checkpoints/last.ckpt") for run in ("one", "two")]
    assert row_names([*paths, Path("/x/model.ckpt")]) == ["one", "two", "model"]
    assert row_names([Path("/x/model.ckpt"), Path("/y/model.ckpt")]) == ["/x/model.ckpt", "/y/model.ckpt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--looks", "snwo"], r"--looks: expected all, moving, still or styles, found 'snwo'; did you mean 'snow'"),
        (["--clips", "1"], "--clips: expected at least 2, found 1; use 30 or more"),
        (["--alone", "1"], "--alone: expected 0, or 2 to the 64 of --clips, found 1"),
        (["--alone", "65"], "--alone: expected 0, or 2 to the 64 of --clips, found 65"),
        (["--seed", "-1"], "--seed: expected a whole number from 0 to 4,294,967,296, found -1"),
        (["--rates", "4,8"], "--rates: expected 3 or more different frame rates such as 4,6,12, found '4,8'"),
        (["--rates", "4,8,fast"], "--rates: expected 3 or more different frame rates"),
        (["--rates", "4,8,12"], r"--rates: expected a network conditioned on the frame rate .* leave out --rates"),
        (["--prompts", "missing.txt"], "missing.txt: expected a text file with one prompt a line, found no such file"),
        (["--device", "abacus"], "--device: expected cpu or a device this machine has, found 'abacus'"),
        (["--steps", "0"], "steps: expected 1 to 999, found 0"),
        (["--sampler", "ddmi"], "sampler: expected a sampler's name, found 'ddmi'"),
        (["--frames", "1"], "tiny.ckpt: expected clips of at least 2 frames, found 1; set --frames"),
        (["--fps", "0"], "fps: expected more than 0"),
        (["--H", "33"], "height: expected a multiple of 4 pixels, found 33; the nearest is 32"),
        (["--reference", "world", "here"], "--reference: expected footage or world, found both; choose one"),
        (["--reference", "here"], "here: there is no such file or folder"),
    ],
)
def test_mistakes(checkpoint, tmp_path, words, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(EvaluationPlan, "make", lambda *_: pytest.fail("clips were made before the mistake showed"))
    with pytest.raises(UserError, match=message):
        evaluate.main([str(checkpoint), *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "5"], "--steps: expected a checkpoint to sample from, found none"),
        (["--alone", "0"], "--alone: expected a checkpoint to sample from, found none"),
        (["--looks", "all"], "--looks: expected a checkpoint, or --reference world, found none"),
        (["--no-spoilt"], "--no-controls: expected --reference with it, found none"),
    ],
)
def test_options_without_effect_are_an_error(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        evaluate.main([str(tmp_path), *words, "--out", str(tmp_path / "out")])


def test_checkpoints_and_videos_of_another_form(checkpoint, tmp_path):
    (tmp_path / "videos").mkdir()
    for number in range(2):
        write_mp4(tmp_path / "videos" / f"{number}.mp4", np.zeros((3, 32, 64, 3), np.uint8), 4)
    _, form = plan_rows([tmp_path / "videos"], None)
    with pytest.raises(
        UserError, match=r"tiny: expected 3 frames of 64x32, 4 a second like the videos, found 3 frames of 48x32"
    ):
        EvaluationPlan(options(tmp_path, *QUICK, frames=3), [checkpoint], form, "")


def test_files_of_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    for content, message in (
        (b"\n# none\n", "expected one prompt a line, found none"),
        (b"\xff\xfe\x00", "expected a text file in UTF-8"),
        (b"0: dawn | 2: night\n", "expected plain prompts, found a prompt schedule"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_prompts(path)
