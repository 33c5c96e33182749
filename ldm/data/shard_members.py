"""Whether the archive and the arrays in a shard say of themselves what the index says of them.

Reading needs neither: the index gives every place and every shape. But other programs will believe these headers, so
that a set is only whole when all three agree: no file of another name or kind at a place that the index names, no
array of objects, which are pickles, and none of another shape.
"""

from __future__ import annotations

import io
import tarfile
import tokenize
from collections.abc import Sequence

import numpy as np

from ldm.data.shard_index import FLOAT16, Span

TAR_BLOCK = 512
LONGEST_NAME = 100  # that fits into a header of an archive; longer ones are kept elsewhere


def member_names(num_captions: int) -> list[str]:
    """What the arrays of a scene are called in the archive, after its key: its latents, then a context a caption."""
    return ["latents.npy", "context.npy", *(f"context.{n}.npy" for n in range(1, num_captions))]


def check_member(header: bytes, name: str, span: Span) -> None:
    """Raise ValueError unless the block before a span is the header of the plain file `name` of its length."""
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise ValueError(f"no header of an archive before {name} ({error})") from None
    if not found.isreg():
        raise ValueError(f"something that is no plain file (kind {found.type!r}) in the place of {name}")
    if found.size != span.length:
        raise ValueError(f"{name} with {found.size:,} bytes in the archive and {span.length:,} in the index")
    if len(name) <= LONGEST_NAME and found.name != name:
        raise ValueError(f"{found.name[:80]!r} in the place of {name}")


def check_array(content: bytes, name: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless a `.npy` file holds float16 numbers of this shape and nothing else."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        found, is_fortran, kind = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else ((), True, None)
    except (ValueError, TypeError, SyntaxError, KeyError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(f"{name} without the header of an array ({str(error)[:80]})") from None
    if kind != FLOAT16 or is_fortran or list(found) != list(shape):
        order = ", by columns," if is_fortran and kind else ""
        raise ValueError(f"{name} with {kind}{order} of shape {list(found)[:8]}, not float16 of {list(shape)}")
    if len(content) - file.tell() != FLOAT16.itemsize * int(np.prod(shape)):
        raise ValueError(f"{name} with {len(content) - file.tell():,} bytes of numbers for the shape {list(shape)}")
