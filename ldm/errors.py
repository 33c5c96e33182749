"""Mistakes a user can mend, and the one place where scripts turn them into a message and an exit status."""

from __future__ import annotations

import argparse
import errno
import re
import sys
from collections.abc import Callable
from typing import NoReturn

REMEDIES = {
    errno.EEXIST: "expected a folder, or nothing yet, found a file of that name; choose another path",
    errno.ENOTDIR: "expected folders all the way, found a file among them; choose another path",
    errno.EISDIR: "expected a file, found a folder; choose another path",
    errno.EACCES: "the system does not allow this; change the permissions or choose another path",
    errno.EPERM: "the system does not allow this; change the permissions or choose another path",
    errno.EROFS: "this file system can only be read; choose another path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}
FULL_DISK = "the disk is full{}. What was finished before is intact: free some space and run the same command again."
LOWER = (
    "lower data.params.batch_size, data.params.frames or the size of the pictures, or set "
    "model.params.unet_config.params.use_checkpoint=true when training; when sampling, lower --frames, --H, --W, "
    "--n_samples or --decode-chunk"
)


# Letters that steer a terminal or turn the line around, and halves of letters, which nothing can write.
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """Something the user can put right; the message says what was expected, what was found, where, and what to do."""


def run_command(command: Callable[[], None]) -> int:
    """Run a script's main function and return the exit status: 0, 1 after a `UserError`, 130 after Ctrl-C.

    Memory that runs out, a full disk and a path that cannot be used are a user's concern too and get messages of their
    own. Anything else is our mistake and keeps its traceback.
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
    """Text with names of a stranger's choice as it can be printed: what would steer a terminal is spelt out."""
    return _STEERING.sub(lambda found: found[0] if found[0] in "\n\t" else repr(found[0])[1:-1], message)


def _message(error: Exception) -> str | None:
    """What to tell the user; None when the mistake is ours."""
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
    """Whether it is Python's, NumPy's or PyTorch's error for that; PyTorch's own allocator has no class for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


class Parser(argparse.ArgumentParser):
    """Raises what it does not understand as a UserError, which starts with `where`."""

    where = ""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.where}{message}{'' if self.where else '; --help lists all options'}")
