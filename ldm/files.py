"""Files that appear whole or not at all."""

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
    """Give a temporary path beside `path` that takes its name when the block ends well and vanishes when it does not.

    What stood at `path` before stays until then. After a kill the temporary file (`.NAME.partial`) may remain; the
    next writer of the same file overwrites it.
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
HALF_CHARACTERS = r"\ud"  # how a half is spelt in JSON, but for case; most texts have none


def parse_json(text: str | bytes, depth: int | None = MAX_DEPTH) -> Any:
    """What JSON says, at most so deep; bytes are UTF-8. Raises ValueError, whose message says what is wrong."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        found = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested without end") from None
    if HALF_CHARACTERS in text.lower() or not text.isascii():
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
    """Raise ValueError for lists and mappings in each other deeper than `most`, and for those inside themselves."""
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
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is beyond every number")
    return number
