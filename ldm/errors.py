"""Mistakes a user can mend, and the one place where scripts turn them into a message and an exit status."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can put right; the message says what was expected, what was found, where, and what to do."""


def run_command(command: Callable[[], None]) -> int:
    """Run a script's main function and return the exit status: 0, 1 after a `UserError`, 130 after Ctrl-C.

    A full disk is a user's concern too and gets a message of its own. Anything else is our mistake and keeps its
    traceback.
    """
    try:
        command()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        sys.stderr.write(
            f"error: the disk is full{where}. What was finished before is intact: free some space and run the same "
            "command again.\n"
        )
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped by Ctrl-C\n")
        return 130
    return 0
