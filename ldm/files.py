"""Atomic writes and strict JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block succeeds and is removed when it fails.

    After a kill the temporary file (`.NAME.partial`) may remain; the next writer of the same file overwrites it.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path | str, content: bytes | str) -> None:
    """Write bytes, or text as UTF-8, through `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


MAX_DEPTH = 64
SURROGATE = r"\ud"  # the escape of a surrogate in JSON, in lower case


def parse_json(text: str | bytes, depth: int | None = MAX_DEPTH) -> Any:
    """Parse JSON, bytes as UTF-8, nested at most `depth` deep. Raises ValueError for anything not strictly valid."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        found = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if SURROGATE in text.lower() or not text.isascii():
        check_characters(found)
    if depth is not None:
        check_depth(found, depth)
    return found


def check_characters(found: Any) -> None:
    """Raise ValueError for a string, at any depth, that cannot be written as UTF-8."""
    waiting = [found]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            value.encode()  # a UnicodeEncodeError is a ValueError
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value


def check_depth(found: Any, most: int = MAX_DEPTH) -> None:
    """Raise ValueError for lists and mappings nested deeper than `most`, or in themselves."""
    waiting = [(found, 0)]
    while waiting:
        value, depth = waiting.pop()
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        if inside and depth >= most:
            raise ValueError(f"nested deeper than {most}")
        waiting += [(part, depth + 1) for part in inside if isinstance(part, dict | list | tuple)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is out of range")
    return number
