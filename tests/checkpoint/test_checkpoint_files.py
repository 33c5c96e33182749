"""Files that are no checkpoint, damaged ones and dangerous ones: one clear message each, and nothing run."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoint.reading import CheckpointError, read_checkpoint
from tests.tiny_checkpoint import image_state, save_as_public


class Touch:
    """Unpickled by a careless reader, creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Evaluate(Touch):
    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


class Stranger:
    pass


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("trap", "name"), [(Touch, "posix.system"), (Evaluate, "eval")])
def test_pickled_function_is_refused_by_name_and_not_run(tmp_path, trap, name, zipped):
    path, trace = tmp_path / "evil.ckpt", tmp_path / "was-run"
    contents = {"state_dict": image_state(), "callbacks": trap(trace)}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"evil.ckpt: expected weights only, .* names .*{name}.*Nothing in it"):
        read_checkpoint(path)
    assert not trace.exists()


def test_foreign_class_is_refused_by_name(tmp_path):
    torch.save({"state_dict": image_state(), "extra": Stranger()}, tmp_path / "odd.ckpt")
    with pytest.raises(
        CheckpointError, match=r"names tests.checkpoint.test_checkpoint_files.Stranger, which may run foreign"
    ):
        read_checkpoint(tmp_path / "odd.ckpt")


def test_stand_ins_do_not_widen_what_may_be_named(tmp_path):
    """The numpy scalar is let in; the array next to it, whose reconstruction is more than a number, is not."""
    import numpy as np  # noqa: PLC0415

    torch.save({"state_dict": image_state(), "extra": np.zeros(3)}, tmp_path / "array.ckpt")
    with pytest.raises(CheckpointError, match=r"multiarray._reconstruct"):
        read_checkpoint(tmp_path / "array.ckpt")


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.ckpt: expected a checkpoint .* found no such file or folder"):
        read_checkpoint(tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_empty_file(tmp_path, suffix):
    (tmp_path / f"empty{suffix}").touch()
    with pytest.raises(CheckpointError, match="found an empty file"):
        read_checkpoint(tmp_path / f"empty{suffix}")


@pytest.mark.parametrize("text", ["version https://git-lfs.github.com/spec/v1", "<!DOCTYPE html><html>", "hi"])
def test_text_renamed_to_ckpt(tmp_path, text):
    (tmp_path / "model.ckpt").write_text(text)
    with pytest.raises(CheckpointError, match=rf"found a file that begins with b'{text[:9]}.*not, for example, a web"):
        read_checkpoint(tmp_path / "model.ckpt")


@pytest.mark.parametrize("share", [0.0001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_half_written_file(tmp_path, form, share):
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.ckpt")
    if form == "safetensors":
        save_file(image_state(), path)
    else:
        save_as_public(image_state(), path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"found one that is corrupt or truncated .* bytes\). Download"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_other_contents(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match="expected a dict of tensors, found list"):
        read_checkpoint(path)
    torch.save({"state_dict": [1]}, path)
    with pytest.raises(CheckpointError, match="expected 'state_dict' to be a dict of tensors, found list"):
        read_checkpoint(path)
    torch.save({"fc.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"found 1 tensors of another model: fc.weight"):
        read_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match=r"found 0 tensors of another model\."):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="corrupt or truncated"):
        read_checkpoint(path)


def test_tensors_that_belong_to_no_part(tmp_path):
    torch.save(image_state() | {"control_model.input.weight": torch.zeros(1)}, tmp_path / "control.ckpt")
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors belong to no .*: control_model\S+\. Remove them"):
        read_checkpoint(tmp_path / "control.ckpt")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"PK")

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(CheckpointError, match=r"model.ckpt: cannot be read \(Permission denied\)"):
        read_checkpoint(path)
