"""Softmax attention, and the choice of who computes it.

sdpa        torch's own, which picks a kernel for the device (the default)
math        two matrix products and a softmax, for the short rows of temporal attention
flash_attn  the flash-attn package: NVIDIA GPU, float16 or bfloat16
xformers    the xformers package: NVIDIA GPU
triton      over frames our own kernel, see `fused_attention`: NVIDIA GPU, up to 64 frames; elsewhere as auto
auto        over frames our kernel where it can be used, on a processor `few_frames` where they are few; else math where
            rows are short (see `for_rows`), and sdpa
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError
from ldm.modules.backends.triton_op import is_installed

BACKENDS = ("sdpa", "math", "flash_attn", "xformers", "triton", "auto")
MASKED_BACKENDS = ("sdpa", "math", "triton", "auto")  # those that can leave keys out
_MODULES = {"flash_attn": "flash_attn", "xformers": "xformers.ops"}
_MOST_CUDA_ROWS = 65_535  # the fused CUDA kernels launch one block row per (batch, head)
_MOST_CPU_WEIGHTS = 2**22  # in float32 16 MiB: of larger blocks the system takes and clears the pages anew each time


def check_backend(name: str) -> None:
    """Raise `UserError` if `name` is no back end, or one whose package cannot be imported here, and say why."""
    if name not in BACKENDS:
        raise UserError(f"attention_backend: expected one of {', '.join(BACKENDS)}, found '{name}'")
    if name in _MODULES:
        _import(name)
    if name == "triton" and not is_installed():
        raise UserError(
            "attention_backend: 'triton' cannot be used, its package is not installed here; pip install triton on a "
            "machine with an NVIDIA GPU, or use 'auto', which does without where it must"
        )


def for_rows(device: str, dtype: torch.dtype, num_queries: int, num_keys: int, dim: int) -> str:
    """What "auto" takes for rows of `num_keys` weights and heads of `dim` on a kind of device: "math" or "sdpa".

    On a CPU, as measured forward and backward with one thread and two: in bfloat16 fused attention takes 2 to 12 times
    as long up to 256 keys; in float32 1 to 1.6 times for heads narrower than a register, 16 numbers, and for others
    about as long or longer up to 80. Weights that are many go to sdpa, which never holds them.
    On a GPU fused attention works on tiles of 64 and more, whatever the row's length.
    """
    if device != "cpu":
        return "math" if max(num_queries, num_keys) <= 16 else "sdpa"
    if dtype not in (torch.float32, torch.float64):
        most_keys, most_weights = 256, 2**18
    else:
        most_keys, most_weights = (256, 2**17) if dim < 16 else (80, 2**15)
    return "math" if num_keys <= most_keys and num_queries * num_keys <= most_weights else "sdpa"


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa", mask: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(d)) v: `b heads n d`, `b heads m d`, `b heads m d` -> `b heads n d`.

    mask: bool `1 heads n m` or what broadcasts to it, True where a query sees a key; only `MASKED_BACKENDS` take one.

    Raises `UserError` when the back end cannot run on these tensors.
    """
    if backend in ("auto", "triton"):
        backend = for_rows(q.device.type, q.dtype, q.shape[-2], k.shape[-2], q.shape[-1])
    if q.is_cuda:
        num_parts = num_launches(q.shape[0], q.shape[1])
    else:
        num_weights = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        num_parts = min(q.shape[0], math.ceil(num_weights / _MOST_CPU_WEIGHTS)) if backend == "math" else 1
    return attend_in_parts(q, k, v, backend, mask, num_parts)


def attend_in_parts(q: Tensor, k: Tensor, v: Tensor, backend: str, mask: Tensor | None, num_parts: int) -> Tensor:
    """`attend`, so many parts of the batch one after the other."""
    if num_parts == 1:
        return _attend(q, k, v, backend, mask)
    parts = zip(*(x.chunk(num_parts) for x in (q, k, v)), strict=True)
    return torch.cat([_attend(*part, backend, mask) for part in parts])


def _attend(q: Tensor, k: Tensor, v: Tensor, backend: str, mask: Tensor | None) -> Tensor:
    if backend == "math":
        logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf)
        return torch.matmul(logits.softmax(dim=-1, dtype=torch.float32).to(v.dtype), v)
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert mask is None, f"the back end {backend} takes no mask"
    return _attend_on_gpu(q, k, v, backend)


def num_launches(batch: int, num_heads: int) -> int:
    """Into how many even parts a batch must go so that none has more rows than a fused CUDA kernel takes."""
    return math.ceil(batch / (_MOST_CUDA_ROWS // num_heads))


def _attend_on_gpu(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    package = _import(backend)
    if not q.is_cuda:
        raise UserError(
            f"attention_backend: '{backend}' needs an NVIDIA GPU, the tensors are on '{q.device.type}'; use 'sdpa' or "
            "'math' there"
        )
    if backend == "flash_attn" and q.dtype not in (torch.float16, torch.bfloat16):
        raise UserError(
            f"attention_backend: 'flash_attn' needs float16 or bfloat16, the tensors are {q.dtype}; train with "
            "precision bf16-mixed, or use 'sdpa'"
        )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    function = package.flash_attn_func if backend == "flash_attn" else package.memory_efficient_attention
    return function(q, k, v).transpose(1, 2)


def _import(backend: str) -> ModuleType:
    try:
        return importlib.import_module(_MODULES[backend])
    except (ImportError, OSError) as error:
        raise UserError(
            f"attention_backend: '{backend}' cannot be used, its package does not import here ({error}); "
            f"pip install '.[gpu]' on a machine with an NVIDIA GPU, or use 'sdpa'"
        ) from error
