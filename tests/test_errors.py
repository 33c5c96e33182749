"""What a mistake looks like to the user: one line that names the path or the setting, and an exit status."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

from ldm.errors import Parser, UserError, run_command


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda file: file.mkdir(), "file: expected a folder or a new path, found a file"),
        (lambda file: (file / "x").mkdir(), "x: expected only folders on the path, found a file"),
        (lambda file: (file / "x").mkdir(parents=True), "x: expected only folders on the path, found a file"),
        (lambda file: file.parent.write_text(""), "folder: expected a file, found a folder; choose another path"),
        (lambda file: os.replace(file, file.parents[1] / "other"), "other: expected a file, found a folder"),
        (lambda file: (file.parent / ("x" * 300)).touch(), "the name is too long; choose a shorter one"),
    ],
)
def test_unusable_path_is_an_error(tmp_path, capsys, act, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "folder" / "file").touch()
    assert run_command(lambda: act(tmp_path / "folder" / "file")) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EACCES, "/x: the system does not allow this; change the permissions or choose another path"),
        (errno.EPERM, "/x: the system does not allow this"),
        (errno.EROFS, "/x: this file system is read-only; choose another path"),
        (errno.ENOSPC, "the disk is full while writing /x. What was finished before is intact"),
        (errno.EDQUOT, "the disk is full while writing /x"),
    ],
)
def test_system_errors(capsys, number, message):
    assert run_command(raising(OSError(number, os.strerror(number), "/x"))) == 1
    assert message in capsys.readouterr().err


def test_program_errors_keep_their_traceback():
    for error in (FileNotFoundError(errno.ENOENT, "no", "/x"), OSError(errno.EPERM, "no"), RuntimeError("no")):
        with pytest.raises(type(error), match="no"):
            run_command(raising(error))
    with pytest.raises(SystemExit):
        run_command(raising(SystemExit(143)))


def test_exit_statuses(capsys):
    assert [run_command(command) for command in (lambda: None, raising(UserError("so")))] == [0, 1]
    assert capsys.readouterr().err == "error: so\n"
    assert run_command(raising(KeyboardInterrupt)) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_lower(capsys, error):
    assert run_command(raising(error)) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: out of memory: lower data.params.batch_size, data.params.frames or the image size")
    assert "unet_config.params.use_checkpoint=true" in text and "--decode-chunk" in text and text.count("\n") == 1


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**55), lambda: np.empty(2**55)])
def test_out_of_memory_errors_of_the_libraries(capsys, allocate):
    assert run_command(allocate) == 1
    assert "error: out of memory" in capsys.readouterr().err


def test_invalid_arguments_are_errors():
    parser = Parser(prog="x", allow_abbrev=False)
    parser.add_argument("--number", type=int)
    with pytest.raises(UserError, match=r"invalid int value: 'a'; --help lists all options$"):
        parser.parse_args(["--number", "a"])
    parser.where = "prompts.txt, line 3: "
    with pytest.raises(UserError, match=r"^prompts.txt, line 3: unrecognized arguments: --numer$"):
        parser.parse_args(["--numer"])
