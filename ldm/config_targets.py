"""Which classes a config may name at `target`: networks, data and callbacks of this project and of its libraries.

A class that is built with words of a stranger's choice can do whatever its constructor does, write files and start
programs; so nothing foreign is even imported, unless the person at the command line has said `--trust-config`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ldm.config_values import ConfigError

# Packages, modules and classes; what lies below one of them may be named.
KNOWN = (
    "ldm.models",
    "ldm.modules",
    "ldm.callbacks",
    "ldm.data.clips",
    "ldm.data.frames",
    "ldm.data.drive_frames",
    "torch.nn",
    "torch.optim",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers.CSVLogger",
    "pytorch_lightning.loggers.TensorBoardLogger",
)
FLAG = "--trust-config"

_trust = [False]


def is_trusted() -> bool:
    """Whether configs may name any class, resolver and TorchScript file."""
    return _trust[-1]


@contextmanager
def trusting(trust: bool = True) -> Iterator[None]:
    """Within the block configs are trusted, if `trust` says so or they were before."""
    _trust.append(trust or is_trusted())
    try:
        yield
    finally:
        _trust.pop()


def check_target(name: str, where: str) -> None:
    """Raise `ConfigError` unless the class `name` may be named; nothing is imported."""
    if is_trusted() or any(name == known or name.startswith(f"{known}.") for known in KNOWN):
        return
    raise ConfigError(
        f"{where}: expected a class of {', '.join(KNOWN)}, all that a config may name, found {name!r}; nothing was "
        f"built. Give {FLAG} if you know where this config comes from and what that class does"
    )
