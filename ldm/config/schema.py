"""Checks of a config's values, sizes and targets.

Values are compared with annotations of numbers, strings, booleans, null, lists, mappings and unions of them. Any other
annotation accepts everything: the constructor has to check.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from ldm.errors import UserError

_KINDS = {int: int, float: int | float, bool: bool, str: str | os.PathLike, NoneType: NoneType}
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", NoneType: "null"}


# Keys that count layers or heads: a network of a million layers would be built forever.
COUNTS = frozenset(
    "num_res_blocks transformer_depth num_hidden_layers layers_per_block num_heads num_attention_heads".split()
)
MAX_COUNT, MAX_WIDTH, MAX_LENGTH = 256, 2**20, 64


class ConfigError(UserError):
    """A config that cannot be used."""


def mapping_at(path: str, value: Any) -> Mapping[str, Any]:
    """The mapping `value`, an empty one for None; `ConfigError` naming `path` for anything else."""
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected a mapping, found {value!r}")
    return value or {}


def check_sizes(params: Any, path: str, is_network: bool = False) -> None:
    """Raise `ConfigError` for keys, at any depth, that ask for an unreasonable number of layers.

    is_network: `params` has nothing else: every number and list is bounded.
    """
    for key, value in params.items() if isinstance(params, Mapping) else ():
        whole = isinstance(value, int) and not isinstance(value, bool)
        most = MAX_COUNT if key in COUNTS else MAX_WIDTH
        if whole and abs(value) > most and (key in COUNTS or is_network):
            raise ConfigError(f"{path}.{key}: expected at most {most:,}, found {str(value)[:40]}")
        if is_network and isinstance(value, list | tuple | Mapping) and len(value) > MAX_LENGTH:
            raise ConfigError(f"{path}.{key}: expected at most {MAX_LENGTH} values, found {len(value):,}")
        if is_network and isinstance(value, list | tuple):
            check_sizes(dict(enumerate(value)), f"{path}.{key}", is_network)
        check_sizes(value, f"{path}.{key}", is_network)


def check_values(values: Mapping[str, Any], annotations: Mapping[str, Any], path: str) -> None:
    """Raise `ConfigError` naming the first of `values` that does not fit its annotation."""
    for key, value in values.items():
        if not fits(value, annotations[key]):
            raise ConfigError(f"{path}.{key}: expected {describe_annotation(annotations[key])}, found {value!r}")


def fits(value: Any, annotation: Any) -> bool:
    """Whether `value` fits `annotation`; a whole number is a number, true and false are not."""
    origin = get_origin(annotation) or annotation
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in get_args(annotation))
    if origin in _KINDS:
        return isinstance(value, _KINDS[origin]) and (origin is bool or not isinstance(value, bool))
    inner = get_args(annotation)
    if origin in (Sequence, list):
        return isinstance(value, list | tuple) and all(fits(one, inner[0]) for one in value if inner)
    if origin in (Mapping, dict):
        return isinstance(value, Mapping) and all(fits(one, inner[1]) for one in value.values() if inner)
    return True


def describe_annotation(annotation: Any) -> str:
    """An annotation as an error message names it."""
    origin, inner = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(map(describe_annotation, inner))
    if origin in (Sequence, list):
        return "a list" + (f", each {describe_annotation(inner[0])}" if inner else "")
    if origin in (Mapping, dict):
        return "a mapping" + (f", each value {describe_annotation(inner[1])}" if inner and inner[1] is not Any else "")
    return _NAMES.get(origin, str(annotation))


# Packages, modules and classes that a config may name, with everything below them.
KNOWN = (
    "ldm.models",
    "ldm.diffusion",
    "ldm.modules",
    "ldm.callbacks",
    "ldm.data.clips",
    "ldm.data.frames",
    "ldm.data.world.frames",
    "torch.nn",
    "torch.optim",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers.CSVLogger",
    "pytorch_lightning.loggers.TensorBoardLogger",
)
FLAG = "--trust-config"

_trust = [False]


def is_trusted() -> bool:
    """Whether configs may name any class, resolver or TorchScript file."""
    return _trust[-1]


@contextmanager
def trusting(trust: bool = True) -> Iterator[None]:
    """Trust configs within the block if `trust` is true or they were trusted before."""
    _trust.append(trust or is_trusted())
    try:
        yield
    finally:
        _trust.pop()


def check_target(name: str, where: str) -> None:
    """Raise `ConfigError` unless a config may name the class `name`; nothing is imported."""
    if is_trusted() or any(name == known or name.startswith(f"{known}.") for known in KNOWN):
        return
    raise ConfigError(
        f"{where}: expected a class of {', '.join(KNOWN)}, found {name!r}; nothing was built. Give {FLAG} if you know "
        "where this config comes from and what that class does"
    )
