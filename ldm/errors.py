"""Errors that a user can correct, and the one place where scripts turn them into a message and an exit status."""

from __future__ import annotations

import argparse
import errno
import re
import sys
from collections.abc import Callable
from typing import NoReturn

REMEDIES = {
    errno.EEXIST: "expected a folder or a new path, found a file; choose another path",
    errno.ENOTDIR: "expected only folders on the path, found a file among them; choose another path",
    errno.EISDIR: "expected a file, found a folder; choose another path",
    errno.EACCES: "the system does not allow this; change the permissions or choose another path",
    errno.EPERM: "the system does not allow this; change the permissions or choose another path",
    errno.EROFS: "this file system is read-only; choose another path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}
FULL_DISK = "the disk is full{}. What was finished before is intact: free some space and run the same command again."
LOWER = (
    "lower data.params.batch_size, data.params.frames or the image size, or set "
    "model.params.unet_config.params.use_checkpoint=true when training; when sampling, lower --frames, --H, --W, "
    "--n_samples or --decode-chunk"
)


# Control and bidirectional characters, and lone surrogates, which cannot be encoded.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """An error that the user can correct; the message says where, what was expected, what was found and what to do."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or whose tensors do not fit the network they are meant for."""


def run_command(command: Callable[[], None]) -> int:
    """Run a script's main function and return the exit status: 0, 1 after a `UserError`, 130 after Ctrl-C.

    Out of memory, a full disk and an unusable path are user errors, too. Any other exception keeps its traceback.
    """
    try:
        command()
    except KeyboardInterrupt:
        sys.stderr.write("stopped by Ctrl-C\n")
        return 130
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {printable(message)}\n")
        return 1
    return 0


def printable(message: str) -> str:
    """Text that may contain untrusted names, with control characters escaped."""
    return _CONTROL.sub(lambda found: found[0] if found[0] in "\n\t" else repr(found[0])[1:-1], message)


def _message(error: Exception) -> str | None:
    """The message for the user; None for an error of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FULL_DISK.format(f" while writing {error.filename}" if error.filename else "")
    if isinstance(error, OSError) and error.errno in REMEDIES and error.filename is not None:
        return f"{error.filename2 or error.filename}: {REMEDIES[error.errno]}"
    if is_lack_of_memory(error):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"out of memory: {LOWER} ({reason})"
    return None


def is_lack_of_memory(error: Exception) -> bool:
    """Whether Python, NumPy or PyTorch, whose CPU allocator raises a plain RuntimeError, ran out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    phrases = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)


class Parser(argparse.ArgumentParser):
    """Raises UserError, whose message starts with `where`, for arguments that it does not accept."""

    where = ""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.where}{message}{'' if self.where else '; --help lists all options'}")
