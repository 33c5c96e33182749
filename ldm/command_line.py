"""The argument parser of all commands."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ldm.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises what it does not understand as a UserError, which starts with `where`."""

    where = ""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.where}{message}{'' if self.where else '; --help lists all options'}")
