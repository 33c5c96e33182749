"""The rehearsal: the stand-in checkpoint, counted sizes, measured commands, weight comparison, and all stages."""

from __future__ import annotations

import io
import logging
import pickletools
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import main as training
from ldm.checkpoint import load_unet, read_checkpoint
from ldm.checkpoint.names import UNET_PREFIX, average_names
from ldm.config import load_config
from ldm.data.preparing.footage import FootageError
from ldm.errors import UserError, run_command
from ldm.video import write_mp4
from scripts import prepare, txt2vid
from scripts.dev import measuring, rehearsal, rehearse
from scripts.dev.measuring import Measured, describe_machine, run_measured
from scripts.dev.rehearsal import (
    MeasuredStep,
    WeightComparison,
    compare,
    count_sizes,
    failures_of,
    image_tensors,
    split_off,
    with_row,
    with_rows_of,
    write_public_checkpoint,
)
from tests.made_footage import draw_drive

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "dev" / "rehearse.py"
CONFIG = str(ROOT / "configs" / "video-sd.yaml")
UNET, ENCODERS = "model.params.unet_config.params", "model.params.{}_config.params"
SMALL_UNET = {"model_channels": 32, "channel_mult": "[1,2]", "num_res_blocks": 1, "attention_resolutions": "[2]"}
TINY = [
    *(f"{UNET}.{key}={value}" for key, value in {**SMALL_UNET, "num_heads": 4, "context_dim": 32}.items()),
    f"{ENCODERS.format('first_stage')}.ddconfig.ch=32",
    f"{ENCODERS.format('cond_stage')}.text_config={{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, "
    "num_attention_heads: 2}",
    "prepare.size=64",
]
MIB = 2**20


@pytest.fixture(scope="module")
def config():
    return load_config([CONFIG], TINY)


@pytest.fixture(scope="module")
def image_file(tmp_path_factory, config) -> Path:
    path = tmp_path_factory.mktemp("written") / "model.ckpt"
    rehearse.main(["--base", CONFIG, "--write", str(path), *TINY])
    return path


def call(folder: Path, *words: str) -> None:
    """Run the script in this process on the tiny config."""
    places = ["--base", CONFIG, "--workdir", str(folder / "work"), "--report", str(folder / "report.md")]
    rehearse.main([*places, *words, *TINY])


def command(folder: Path) -> list[str]:
    places = ["--base", CONFIG, "--workdir", str(folder / "work"), "--report", str(folder / "docs" / "report.md")]
    return [sys.executable, str(SCRIPT), *places, *TINY]


def test_full_size_has_the_tensors_of_the_public_file(golden_keys):
    expected = {name: (shape, dtype.removeprefix("torch.")) for name, (shape, dtype) in golden_keys["keys"].items()}
    found = {
        name: (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in image_tensors(load_config([CONFIG])).items()
    }
    assert len(found) == 1143 and found == expected


def test_sizes_are_counted_without_memory():
    sizes = count_sizes(load_config([CONFIG]))
    assert sizes.num_parameters == 1_104_679_736
    assert 4.2e9 < sizes.image_file < 4.3e9
    image_weights = sizes.image_file - 4 * 859_520_964
    expected = image_weights + 4 * sizes.num_parameters + (4 + 2.04) * sizes.num_trained
    assert sizes.video_file == pytest.approx(expected, abs=1)
    without = count_sizes(load_config([CONFIG], ["lightning.callbacks.average=null"]))
    assert sizes.video_file - without.video_file == pytest.approx(4 * sizes.num_trained, abs=1)


def test_the_written_file_has_the_format_of_lightning_and_torch(image_file, config):
    names = torch.serialization.get_unsafe_globals_in_checkpoint(image_file)
    assert names == ["pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"]
    with zipfile.ZipFile(image_file) as archive:
        assert archive.testzip() is None
        pickled = archive.read("model/data.pkl")
    assert next(pickletools.genops(pickled))[1] == 2
    contents = torch.load(image_file, weights_only=False)
    assert contents.keys() == {*rehearse.PUBLIC_FILE_KEYS, "state_dict"}
    mapped = read_checkpoint(image_file).tensors
    expected = image_tensors(config)
    assert contents["state_dict"].keys() == mapped.keys() == expected.keys()
    for name, tensor in contents["state_dict"].items():
        assert torch.equal(tensor, mapped[name])
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype), name
        assert expected[name].is_meta or torch.equal(tensor, expected[name])
    assert image_file.stat().st_size == pytest.approx(count_sizes(config).image_file, rel=0.01)


def test_random_weights_keep_activations_of_order_one(image_file):
    unet = load_unet(image_file, load_config([CONFIG], TINY).model.params.unet_config)
    generator = torch.Generator().manual_seed(1)
    noisy, text = torch.randn(1, 5, 4, 8, 8, generator=generator), torch.randn(1, 7, 32, generator=generator)
    nothing_known = torch.cat([torch.ones(1, 5, 1, 8, 8), torch.zeros(1, 5, 4, 8, 8)], dim=2)
    with torch.no_grad():
        out = unet(torch.cat([noisy, nothing_known], dim=2), torch.tensor([500]), text)
    assert 0.2 < out.std() < 5
    moments = read_checkpoint(image_file).tensors["first_stage_model.quant_conv.weight"]
    assert moments.std() == pytest.approx(8**-0.5, rel=0.5)


def run_here(command: list[str | Path], show: Callable[[str], None]) -> Measured:
    """Stands for `run_measured`: the same scripts, in this process."""
    scripts = {"rehearse.py": rehearse, "prepare.py": prepare, "main.py": training, "txt2vid.py": txt2vid}
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        scripts[Path(command[1]).name].main(list(map(str, command[2:])))
    return Measured(0, 1.0, MIB, None, output.getvalue())


@pytest.mark.slow
def test_all_stages(tmp_path, monkeypatch):
    """The real scripts from the written file to the MP4; only the report is left."""
    monkeypatch.setattr(rehearse, "run_measured", run_here)
    monkeypatch.setattr(logging.getLogger("ldm"), "handlers", [])  # those of earlier runs have streams of their own
    (tmp_path / "work").mkdir()
    call(tmp_path)
    assert list((tmp_path / "work").iterdir()) == []
    report = (tmp_path / "report.md").read_text()
    rows = re.findall(r"^\| ([a-z ]+) \| 1.0 \| 0.00 \| - \| ([\d.,]+) \|$", report, flags=re.M)
    stages = ["write the image checkpoint", "prepare two clips", "train one step", "sample a clip"]
    assert [stage for stage, _ in rows] == stages
    on_disk = [float(size.replace(",", "")) for _, size in rows]
    sizes = count_sizes(load_config([CONFIG], TINY))
    assert on_disk[0] == pytest.approx(sizes.image_file / 1e6, rel=0.02)
    assert on_disk[2] == pytest.approx(sizes.video_file / 1e6, rel=0.1)
    assert min(on_disk) > 0
    assert re.search(r"the loss is finite: [\d.]+$", report, flags=re.M)
    assert re.search(r"frozen: [1-9]\d+ tensors equal .* bit for bit; changed: none$", report, flags=re.M)
    assert re.search(r"trained: [1-9]\d+ tensors were updated; .* without this reason: none$", report, flags=re.M)
    assert "the MP4 has 6 frames of 64x64 at 10 per second" in report
    assert "FAILED" not in report and str(tmp_path / "work") not in report
    assert "python main.py --base" in report
    assert all(f"`{override}`: " in report for override in rehearse.DEPARTURES)


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs of a shell ignore it

    process = subprocess.Popen(command(tmp_path), **pipes, cwd=tmp_path, preexec_fn=listen)  # noqa: PLW1509
    for line in process.stdout:
        if "write the image checkpoint" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "stopped by Ctrl-C" in errors
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_space_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(UserError, match=r"expected 1\.1 GB of free disk .*found 1\.0 GB; free some, or give a --workd"):
        call(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--video=nowhere.mp4", r"nowhere\.mp4: there is no such file"),
        ("data.params.batchsize=1", r"data\.params\.batchsize: nothing reads this key; did you mean 'batch_size'"),
        ("--wrok", "unrecognized arguments: --wrok; --help lists all options"),
        ("--most=9", "--most: expected --step-only with it"),
        ("--ckpt=model.ckpt", "--ckpt: expected --step-only with it"),
    ],
)
def test_bad_options_are_errors_before_anything_is_written(tmp_path, option, message):
    with pytest.raises(UserError, match=message):
        call(tmp_path, option)
    assert list(tmp_path.iterdir()) == []


def test_short_footage_is_an_error(tmp_path):
    short = tmp_path / "short.mp4"
    write_mp4(short, draw_drive(9, 64, 0), 10)
    with pytest.raises(FootageError, match=r"expected at least 10 frames at 10 per second, for 2 clips of 5, found 9"):
        call(tmp_path, "--video", str(short))
    assert list(tmp_path.iterdir()) == [short]


@pytest.mark.parametrize(
    ("status", "message"),
    [(3, r"'write the image checkpoint' failed \(exit status 3\)"), (-9, "most likely out of memory")],
)
def test_a_failed_stage_ends_the_rehearsal_and_leaves_nothing(tmp_path, monkeypatch, status, message):
    monkeypatch.setattr(rehearse, "run_measured", lambda *_: Measured(status, 1.0, MIB, None, ""))
    with pytest.raises(UserError, match=message):
        call(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def stages_succeed(monkeypatch):
    """Every command succeeds without output."""
    monkeypatch.setattr(rehearse, "run_measured", lambda *_: Measured(0, 1.0, MIB, None, ""))
    monkeypatch.setattr(rehearse, "num_bytes_in", lambda path: 1)


def test_a_stage_without_output_is_an_error_and_keep_keeps_the_files(tmp_path, stages_succeed, capsys):
    with pytest.raises(UserError, match=r"expected one file logs/\*/checkpoints/last\.ckpt, found 0"):
        call(tmp_path, "--keep")
    (folder,) = (tmp_path / "work").iterdir()
    assert f"kept: {folder}" in capsys.readouterr().out.replace("\n", "")
    assert sorted(path.name for path in (folder / "footage").iterdir()) == ["clip0.mp4", "clip1.mp4"]


def test_failed_checks(tmp_path):
    place = rehearse.RehearsalFiles(tmp_path)
    place.samples.mkdir()
    write_mp4(place.samples / "00000.mp4", np.zeros((5, 16, 16, 3), np.uint8), 10)
    (place.samples / "00000.png").write_bytes(b"sheet")

    def results(loss: str, weights: WeightComparison) -> list[bool]:
        measured = Measured(0, 1.0, MIB, None, f"step 1/1, epoch 0, loss {loss}, 1.00 s/step")
        return [is_well for is_well, _ in rehearse.checks(place, measured, weights)]

    assert results("1.2500", WeightComparison(3, [], 4, [], ["idle"])) == [True, True, True, False]
    assert results("nan", WeightComparison(3, ["a"], 4, ["b"], [])) == [False, False, False, False]
    assert results("1.0", WeightComparison(0, [], 0, [], [])) == [True, False, False, False]


def test_a_failed_check_is_in_the_report_and_in_the_exit_status(tmp_path, stages_succeed, monkeypatch, capsys):
    monkeypatch.setattr(rehearse.RehearsalFiles, "only", lambda self, pattern: self.folder / "file")
    monkeypatch.setattr(rehearse, "compare", lambda *_: None)
    monkeypatch.setattr(rehearse, "checks", lambda *_: [(True, "first"), (False, "second")])
    assert run_command(lambda: call(tmp_path)) == 1
    assert "expected all checks to pass, found: second" in capsys.readouterr().err
    report = (tmp_path / "report.md").read_text()
    assert "* first" in report
    assert "* **FAILED** second" in report
    assert not (tmp_path / "work").exists()


def test_compare_is_bitwise(tmp_path, image_file, config):
    """All trained weights change but one, and one frozen bias changes from 0.0 to -0.0."""
    before = {name: tensor.clone() for name, tensor in read_checkpoint(image_file).tensors.items()}
    unet = load_unet(image_file, config)
    weights = {UNET_PREFIX + name: tensor for name, tensor in unet.state_dict().items()}
    averages = average_names(name.removeprefix(UNET_PREFIX) for name in weights)
    frozen = f"{UNET_PREFIX}middle_block.1.transformer_blocks.0.norm1.bias"
    still = f"{UNET_PREFIX}input_blocks.0.0.temporal.bias"
    idle = f"{UNET_PREFIX}middle_block.1.transformer_blocks.0.temporal.norm.bias"
    spatial = re.compile(r"\.1\.(norm|proj_in|proj_out|transformer_blocks\.0\.(attn|ff|norm))")
    trained = {name for name in weights if not spatial.search(name) or ".temporal." in name}
    after = before | weights | {averages[name.removeprefix(UNET_PREFIX)]: weights[name] for name in trained}
    after |= {name: weights[name] + 0.5 for name in trained - {still, idle}}
    after[frozen] = -before[frozen]
    assert torch.equal(after[frozen], before[frozen])  # == ignores the sign of zero
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": after}, path)
    found = compare(image_file, path, config)
    assert (found.changed, found.unchanged, found.idle) == ([frozen], [still], [idle])
    assert found.num_updated == len(trained) - 2
    assert found.num_equal == len(before.keys() - trained) - 1
    del after[frozen]
    torch.save({"state_dict": after}, path)
    assert compare(image_file, path, config).changed == [frozen]


def test_tensors_of_any_stride_are_written(tmp_path):
    tensors = {"transposed": torch.arange(6.0).view(2, 3).t(), "number": torch.tensor(3.0), "ids": torch.arange(4)}
    write_public_checkpoint(tmp_path / "x.ckpt", tensors, {"epoch": 1}, torch.Generator())
    contents = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert contents["epoch"] == 1
    for name, tensor in tensors.items():
        assert torch.equal(contents["state_dict"][name], tensor)


def test_a_command_is_measured():
    program = "import time; x = b'1' * (200 << 20); print('started'); time.sleep(1.5); raise SystemExit(7)"
    lines = []
    measured = run_measured([sys.executable, "-c", program], lines.append)
    assert lines == ["started"]
    assert measured.output == "started\n"
    assert measured.status == 7
    assert measured.seconds > 1.5
    assert 200 * MIB < measured.peak_memory
    assert measured.peak_own_memory is None or 200 * MIB < measured.peak_own_memory < 250 * MIB
    assert run_measured([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], lines.append).status == -9


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no smaps_rollup")
def test_memory_of_children_counts_and_shared_memory_counts_once():
    program = "import os, time; x = b'1' * (100 << 20); os.fork(); {more} time.sleep(1.5)"
    shared = run_measured([sys.executable, "-c", program.format(more="")], print)
    assert 100 * MIB < shared.peak_own_memory < 150 * MIB
    own = run_measured([sys.executable, "-c", program.format(more="y = b'2' * (100 << 20);")], print)
    assert 300 * MIB < own.peak_own_memory < 350 * MIB


def test_an_interrupt_ends_the_command_and_its_children(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(1.5); open({str(mark)!r}, 'w')"
    program = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print('go'); p.wait()"

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_measured([sys.executable, "-c", program], stop)
    time.sleep(2)
    assert not mark.exists()


def test_the_machine_is_described(monkeypatch):
    version = re.escape(torch.__version__)
    assert re.search(rf"\d+ cores \(.+\), [\d.]+ GiB of memory, torch {version}", describe_machine())
    facts = {"model name": "Some CPU", "flags": "fpu avx2 amx_bf16 xyz"}
    monkeypatch.setattr(measuring, "_cpu_facts", lambda: facts)
    assert describe_machine().startswith("Some CPU, ")
    assert "(avx2, amx_bf16)" in describe_machine()


def step(name: str = "fit-8gb", size: str = "2 x 5", loss: float = 1.25) -> MeasuredStep:
    return MeasuredStep(name, size, loss, Measured(0, 61.2, 3 * 2**30, 2**30, ""), 2**29, 2**28)


@pytest.mark.slow
def test_a_step_of_a_preset_gets_a_row(tmp_path, monkeypatch):
    """A real step in a process of its own, from an existing checkpoint."""
    counted = SimpleNamespace(peak=SimpleNamespace(total=64 * MIB))
    monkeypatch.setattr(rehearsal, "count_step", lambda *_: counted)
    image, report, work = tmp_path / "model.ckpt", tmp_path / "report.md", tmp_path / "work"
    rehearse.main(["--base", CONFIG, "--write", str(image), *TINY])
    preset = [str(ROOT / "configs" / "fit-8gb.yaml"), "model.params.optimizer.name=adamw"]
    words = ["--step-only", "--ckpt", str(image), "--workdir", str(work), "--report", str(report), "--most", "9"]
    report.write_text("# Rehearsal\n\nas before\n")
    rehearse.main([*words, "--base", CONFIG, *preset, *TINY])
    text = report.read_text()
    assert text.startswith("# Rehearsal\n\nas before\n")
    cells = r"\| 2 x 5 \| ([\d.]+) \| ([\d.]+) \| ([\d.]+|-) \| ([\d.]+) \| ([\d.]+) \| \d+ \| [\d-]+ \|$"
    loss, resident, _, cpu_bytes, gpu_bytes = re.search(r"^\| fit-8gb `.*` " + cells, text, flags=re.M).groups()
    assert 0 < float(loss) < 100
    assert 0 < float(gpu_bytes) <= float(cpu_bytes) < float(resident) < 4
    assert not work.exists() and image.is_file()


def test_rows_are_replaced_and_kept_by_a_full_rehearsal(tmp_path):
    report = with_row(with_row("# Rehearsal\n\nas before\n", step(loss=1.5)), step("long-64", "2 x 8"))
    report = with_row(report, step())
    before, section = split_off(report)
    assert before == "# Rehearsal\n\nas before\n\n"
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert rows[0].startswith("| long-64 | 2 x 8 | 1.2500 |") and rows[1].startswith("| fit-8gb | 2 x 5 | 1.2500 |")
    assert len(rows) == 2
    assert rows[0].split(" | ")[3:8] == ["3.00", "1.00", "0.50", "0.25", "61"]
    path = tmp_path / "report.md"
    assert with_rows_of(path, "# New\n") == "# New\n"
    path.write_text(report)
    assert with_rows_of(path, "# New\n") == f"# New\n\n{section}"


def test_a_step_with_too_much_memory_or_a_bad_loss_fails():
    assert failures_of(step(), 9) == failures_of(step(), None) == []
    assert failures_of(step(), 3) == ["3.22 GB resident, more than 3"]
    assert failures_of(step(loss=float("nan")), 9) == ["the loss is nan, not finite"]
