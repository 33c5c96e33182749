"""Training all models of the procedural world: order of the commands, time per stage, resuming."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from ldm.config import check, load_config
from ldm.data.world import MOVING_LOOKS, STILL_LOOKS
from ldm.errors import UserError
from ldm.runs.arguments import parse_arguments
from scripts import prepare, train_drive
from scripts.train_drive import STAGES, DriveTraining, TrainingBudget, config_of, main, read_arguments

STEPS_A_SECOND = 10


def budget(minutes: float = 1.0, on_gpu: bool = False, **arguments) -> TrainingBudget:
    return TrainingBudget(minutes, {"images": 40, "clips": 20}, on_gpu, arguments)


class Scripts:
    """Replaces main.py and prepare.py: trains ten steps a second up to a limit and records the commands.

    stop_at: a stage that is interrupted in the middle of its second run.
    """

    def __init__(self, stop_at: str = "") -> None:
        self.commands, self.stop_at = [], stop_at

    def __call__(self, words) -> int:
        self.commands.append(list(words))
        if words[0] == "scripts/prepare.py":
            prepare.parse_arguments(words[1:])
            Path(words[words.index("--out") + 1]).mkdir()
            return 0
        options = parse_arguments(words[1:])
        stage = options.name or next(name for name in STAGES if options.resume.endswith(f"_{name}"))
        check(load_config([config_of(stage)], options.overrides))
        path = Path(options.resume or f"{options.logdir}/2026-01-01_{options.name}") / "checkpoints" / "last.ckpt"
        before = torch.load(path)["callbacks"]["Timer"]["time_elapsed"]["train"] if path.exists() else 0.0
        hours, minutes, seconds = (int(part) for part in options.trainer["max_time"].split(":")[1:])
        elapsed = min(3600 * hours + 60 * minutes + seconds, options.trainer["max_steps"] / STEPS_A_SECOND)
        is_stopped = bool(self.stop_at) and path.parts[-3].endswith(self.stop_at) and before > 0
        elapsed = before + (elapsed - before) / (2 if is_stopped else 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"Timer": {"time_elapsed": {"train": elapsed}}}
        torch.save({"global_step": int(elapsed * STEPS_A_SECOND), "callbacks": state}, path)
        if is_stopped:
            raise KeyboardInterrupt
        return 0

    def of(self, stage: str) -> list[list[str]]:
        is_of = re.compile(rf"(-n {stage} |-r \S*_{stage} )")
        return [words for words in self.commands if is_of.search(" ".join(words))]


def train(out: Path, given: TrainingBudget, stages=STAGES, **options) -> Scripts:
    scripts = Scripts(**options)
    for name in stages:
        DriveTraining(out, given, scripts).make(name)
    return scripts


def value(words: list[str], key: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(f"{key}="))


def value_after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_stages_are_trained_in_order_with_the_checkpoints_of_earlier_ones(tmp_path):
    scripts = train(tmp_path, budget())
    kinds = [words[0] if words[0] != "main.py" else words[words.index("-n") + 1] if "-n" in words else "again"
             for words in scripts.commands]  # fmt: skip
    both = ["again"]
    assert kinds == [
        "autoencoder", *both, "text", *both, "judge", *both, "scripts/prepare.py", "image", *both,
        "scripts/prepare.py", "video", *both, "temporal_decoder", *both,
    ]  # fmt: skip
    last = {name: str(tmp_path / f"logs/2026-01-01_{name}/checkpoints/last.ckpt") for name in STAGES}
    for words in scripts.of("video"):
        assert value(words, "model.params.first_stage_config.params.ckpt_path") == last["autoencoder"]
        assert value(words, "model.params.cond_stage_config.params.ckpt_path") == last["text"]
        assert value(words, "model.params.ckpt_path") == last["image"]
        assert value(words, "data.params.root") == str(tmp_path / "clips")
    assert not any(word.startswith("model.params.ckpt_path=") for word in scripts.of("image")[0])
    assert value(scripts.of("temporal_decoder")[0], "model.params.ckpt_path") == last["video"]
    images, clips = (words for words in scripts.commands if words[0] == "scripts/prepare.py")
    assert images[images.index("--frames") + 1] == "1" and images[images.index("--world") + 1] == "40"
    assert "--looks" not in images
    looks = clips[clips.index("--looks") + 1].split(",")
    assert looks == list(MOVING_LOOKS) and not set(looks) & set(STILL_LOOKS)
    assert images[-2:] == clips[-2:] and last["text"] in images[-1]


def test_a_stage_is_trained_for_its_minutes(tmp_path):
    scripts = train(tmp_path, budget(minutes=10), ["judge"])
    flat, last = scripts.of("judge")
    assert value(flat, "--max_time") == "00:00:07:30" and int(value(flat, "--max_steps")) > 1_000_000
    assert value(last, "--max_time") == "00:00:10:00"
    total = int(value(last, "--max_steps"))
    assert total == 4500 + 1425  # nearly all the steps that ten minutes have, as the first ones tell
    assert value(last, "--val_check_interval") == str(total)
    assert value(last, "model.params.cooldown_steps") == "1425"
    done = json.loads((tmp_path / "stages.json").read_text())
    assert done == {"judge": {"minutes": 10, "steps": total, "seconds": 592.5}}
    assert "model.params.cooldown_steps" not in " ".join(train(tmp_path, budget(), ["autoencoder"]).commands[1])


def test_the_same_command_does_nothing_and_more_minutes_resume(tmp_path, capsys):
    train(tmp_path, budget(minutes=10))
    assert train(tmp_path, budget(minutes=10)).commands == []
    assert "video: already trained for 10 minutes" in capsys.readouterr().out
    scripts = train(tmp_path, budget(minutes=30))
    assert [words[1:3] for words in scripts.commands] == [
        ["-r", str(tmp_path / f"logs/2026-01-01_{name}")]
        for name in ("judge", "judge", "video", "video", "temporal_decoder", "temporal_decoder")
    ]
    allowed = {name: value_after(scripts.of(name)[0], "--allow") for name in ("judge", "video", "temporal_decoder")}
    assert allowed == {"judge": "config", "video": "config", "temporal_decoder": "config,model"}
    assert [value(words, "--max_time") for words in scripts.of("video")] == ["00:00:22:30", "00:00:30:00"]
    assert int(value(scripts.of("video")[1], "--max_steps")) > 17_000
    shown = capsys.readouterr().out
    for name, later in (("autoencoder", "image"), ("text", "image"), ("image", "video")):
        assert f"{name}: not trained further, since {later} depends on it" in shown


def test_an_interrupted_stage_is_resumed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, budget(minutes=10), stop_at="text")
    scripts = train(tmp_path, budget(minutes=10))
    first = scripts.commands[0]
    assert first[1:3] == ["-r", str(tmp_path / "logs/2026-01-01_text")]
    assert int(value(first, "--max_steps")) == 5212 + 748  # it was stopped at 5212
    assert len(scripts.of("text")) == 1 and len(scripts.of("video")) == 2


def test_arguments_of_one_stage_and_of_a_gpu(tmp_path):
    scripts = train(tmp_path, budget(on_gpu=True, video=["data.params.batch_size=3", "--seed=1"]))
    for words in scripts.of("video"):
        assert words[-2:] == ["data.params.batch_size=3", "--seed=1"]
        assert value_after(words, "--accelerator") == "gpu"
    assert int(value(scripts.of("image")[0], "data.params.num_workers")) >= 1
    assert "data.params.num_workers" not in " ".join(train(tmp_path / "cpu", budget()).of("image")[0])


def test_a_missing_checkpoint_of_an_earlier_stage_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"expected the checkpoint of the stage 'autoencoder', found none; train it"):
        train(tmp_path, budget(), ["image"])


def test_a_failing_script_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"main.py ended with status 1"):
        DriveTraining(tmp_path, budget(), lambda words: 1).make("text")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "--minutes: expected more than 0"),
        (["--stages", "image,vido"], r"--stages: .*found 'vido'; did you mean 'video'"),
        (["videos:a=1"], r"videos:a=1: expected STAGE:ARGUMENT .*did you mean 'video'"),
        (["video"], r"video: expected STAGE:ARGUMENT"),
    ],
)
def test_invalid_options(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        main(["--out", str(tmp_path), *words])


def test_the_command(tmp_path, monkeypatch):
    scripts = Scripts()
    monkeypatch.setattr(train_drive, "run_script", scripts)
    options = ["--accelerator", "cpu", "--minutes", "2", "--stages", "text,autoencoder"]
    main(["--out", str(tmp_path), *options, "text:--seed=1"])
    assert [words[words.index("-n") + 1] for words in scripts.commands[::2]] == ["autoencoder", "text"]


def test_arguments_by_stage():
    assert read_arguments(["video:a=1", "image:b=2", "video:--seed=3"]) == {
        "video": ["a=1", "--seed=3"],
        "image": ["b=2"],
    }
