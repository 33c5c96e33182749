"""Temporal attention as one Triton kernel for each direction; needs triton.

Rows are short, 2 to 64 frames, and there are pixels x heads of them. One program takes a few pixels of one head: it
reads queries, keys and values by strides from the output of the projections, `(b t) n (heads d)`, rotates queries and
keys by position in registers (see `temporal.rotate_by_position`) and writes the output in the same layout. No
transposed copy and no weight matrix reaches memory; the backward pass computes the weights again. Sums and the softmax
are float32.

The rows of several pixels share a square tile of weights, of which only the blocks on the diagonal count, because
matrix products on a GPU have at least 16 rows. A head's channels are two halves, paired by the rotation. Programs are
numbered along the axis of the grid that has room for 2^31. `triton_op` makes an operator of the two launches.
"""
# ruff: noqa: ANN001, ANN202, N803, N806, PLR0913, PLR0917
# Kernels take single numbers of Triton's types; upper-case arguments are compile-time constants.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rows_of_program(num_pixels, num_heads, T: tl.constexpr, BLOCK: tl.constexpr):
    """Clip and head of this program; for each row of its tile: pixel in the tile, pixel, frame, whether it is a row."""
    program = tl.program_id(0).to(tl.int64)
    PIXELS: tl.constexpr = BLOCK // T
    num_groups = (num_pixels + PIXELS - 1) // PIXELS
    head = program % num_heads  # neighbouring programs share cache lines
    group = (program // num_heads) % num_groups
    clip = program // (num_heads * num_groups)
    row = tl.arange(0, BLOCK)
    square, frame = row // T, row % T
    pixel = group * PIXELS + square
    return clip, head, square, pixel, frame, (square < PIXELS) & (pixel < num_pixels)


@triton.jit
def _offsets(clip, pixel, frame, by_frame, by_pixel, T: tl.constexpr):
    """Offset of each row of a tensor `(b t) n c` with these strides."""
    return (clip * T + frame) * by_frame + pixel * by_pixel


@triton.jit
def _load_halves(tensor, offsets, by_channel, head, is_row, D: tl.constexpr, PADDED: tl.constexpr):
    """The two halves of a head's channels for each row, padded with zeros."""
    channel = tl.arange(0, PADDED)
    exists = is_row[:, None] & (channel < D // 2)[None, :]
    where = tensor + offsets[:, None] + (head * D + channel)[None, :] * by_channel
    return tl.load(where, mask=exists, other=0.0), tl.load(where + D // 2 * by_channel, mask=exists, other=0.0)


@triton.jit
def _store_halves(tensor, offsets, by_channel, head, is_row, first, second, D: tl.constexpr, PADDED: tl.constexpr):
    channel = tl.arange(0, PADDED)
    exists = is_row[:, None] & (channel < D // 2)[None, :]
    where = tensor + offsets[:, None] + (head * D + channel)[None, :] * by_channel
    tl.store(where, first.to(tensor.dtype.element_ty), mask=exists)
    tl.store(where + D // 2 * by_channel, second.to(tensor.dtype.element_ty), mask=exists)


@triton.jit
def _rotate(first, second, frame, sign, D: tl.constexpr, PADDED: tl.constexpr, LOG_PERIOD: tl.constexpr):
    """Rotate pairs of channels by the angles of their frames, or back with sign -1; in float32."""
    if LOG_PERIOD == 0.0:
        return first, second
    frequency = tl.exp2(tl.arange(0, PADDED).to(tl.float32) * (-LOG_PERIOD / (D // 2)))
    angle = frame.to(tl.float32)[:, None] * frequency[None, :]
    cosine, sine = tl.cos(angle), tl.sin(angle) * sign
    one, two = first.to(tl.float32), second.to(tl.float32)
    return (one * cosine - two * sine).to(first.dtype), (one * sine + two * cosine).to(second.dtype)


@triton.jit
def _product(one, two, PRECISION: tl.constexpr):
    """Product of two matrices, summed in float32."""
    if PRECISION == "interpreted":  # it multiplies the bits of bfloat16 numbers
        product = tl.dot(one.to(tl.float32), two.to(tl.float32))
    else:
        product = tl.dot(one, two, input_precision=PRECISION)
    return product


@triton.jit
def _weights(q1, q2, k1, k2, square, frame, is_row, SCALE: tl.constexpr, RADIUS: tl.constexpr, SEES_FIRST: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """Softmax over the frames that each row sees: of its own pixel, and with a RADIUS from 0 at most that far away."""
    logits = _product(q1, tl.trans(k1), PRECISION) + _product(q2, tl.trans(k2), PRECISION)
    logits = logits * SCALE
    sees = (square[:, None] == square[None, :]) & is_row[None, :]
    if RADIUS >= 0:
        apart = frame[:, None] - frame[None, :]
        near = (apart <= RADIUS) & (apart >= -RADIUS)
        if SEES_FIRST:
            near = near | (frame == 0)[None, :]
        sees = sees & near
    # Padding rows see everything, so the sum of their softmax is not 0; they are not stored.
    logits = tl.where(sees | (is_row == 0)[:, None], logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _forward(
    q, k, v, out,
    q_frame, q_pixel, q_channel, k_frame, k_pixel, k_channel, v_frame, v_pixel, v_channel, o_frame, o_pixel,
    num_pixels, num_heads,
    T: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, LOG_PERIOD: tl.constexpr,
    RADIUS: tl.constexpr, SEES_FIRST: tl.constexpr, PRECISION: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    clip, head, square, pixel, frame, is_row = _rows_of_program(num_pixels, num_heads, T, BLOCK)
    q1, q2 = _load_halves(q, _offsets(clip, pixel, frame, q_frame, q_pixel, T), q_channel, head, is_row, D, PADDED)
    k1, k2 = _load_halves(k, _offsets(clip, pixel, frame, k_frame, k_pixel, T), k_channel, head, is_row, D, PADDED)
    v1, v2 = _load_halves(v, _offsets(clip, pixel, frame, v_frame, v_pixel, T), v_channel, head, is_row, D, PADDED)
    q1, q2 = _rotate(q1, q2, frame, 1.0, D, PADDED, LOG_PERIOD)
    k1, k2 = _rotate(k1, k2, frame, 1.0, D, PADDED, LOG_PERIOD)
    weights = _weights(q1, q2, k1, k2, square, frame, is_row, SCALE, RADIUS, SEES_FIRST, PRECISION).to(v1.dtype)
    out1, out2 = _product(weights, v1, PRECISION), _product(weights, v2, PRECISION)
    offsets = _offsets(clip, pixel, frame, o_frame, o_pixel, T)
    _store_halves(out, offsets, 1, head, is_row, out1, out2, D, PADDED)


@triton.jit
def _backward(
    q, k, v, grad, dq, dk, dv,
    q_frame, q_pixel, q_channel, k_frame, k_pixel, k_channel, v_frame, v_pixel, v_channel,
    g_frame, g_pixel, g_channel, o_frame, o_pixel,
    num_pixels, num_heads,
    T: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, LOG_PERIOD: tl.constexpr,
    RADIUS: tl.constexpr, SEES_FIRST: tl.constexpr, PRECISION: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    clip, head, square, pixel, frame, is_row = _rows_of_program(num_pixels, num_heads, T, BLOCK)
    q1, q2 = _load_halves(q, _offsets(clip, pixel, frame, q_frame, q_pixel, T), q_channel, head, is_row, D, PADDED)
    k1, k2 = _load_halves(k, _offsets(clip, pixel, frame, k_frame, k_pixel, T), k_channel, head, is_row, D, PADDED)
    q1, q2 = _rotate(q1, q2, frame, 1.0, D, PADDED, LOG_PERIOD)
    k1, k2 = _rotate(k1, k2, frame, 1.0, D, PADDED, LOG_PERIOD)
    weights = _weights(q1, q2, k1, k2, square, frame, is_row, SCALE, RADIUS, SEES_FIRST, PRECISION)
    g1, g2 = _load_halves(grad, _offsets(clip, pixel, frame, g_frame, g_pixel, T), g_channel, head, is_row, D, PADDED)
    v1, v2 = _load_halves(v, _offsets(clip, pixel, frame, v_frame, v_pixel, T), v_channel, head, is_row, D, PADDED)
    offsets = _offsets(clip, pixel, frame, o_frame, o_pixel, T)

    transposed = tl.trans(weights.to(g1.dtype))
    dv1, dv2 = _product(transposed, g1, PRECISION), _product(transposed, g2, PRECISION)
    _store_halves(dv, offsets, 1, head, is_row, dv1, dv2, D, PADDED)

    d_weights = _product(g1, tl.trans(v1), PRECISION)
    d_weights += _product(g2, tl.trans(v2), PRECISION)
    d_logits = weights * (d_weights - tl.sum(weights * d_weights, axis=1)[:, None])
    d_logits = (d_logits * SCALE).to(q1.dtype)
    dq1, dq2 = _product(d_logits, k1, PRECISION), _product(d_logits, k2, PRECISION)
    dq1, dq2 = _rotate(dq1, dq2, frame, -1.0, D, PADDED, LOG_PERIOD)
    _store_halves(dq, offsets, 1, head, is_row, dq1, dq2, D, PADDED)

    transposed = tl.trans(d_logits)
    dk1, dk2 = _product(transposed, q1, PRECISION), _product(transposed, q2, PRECISION)
    dk1, dk2 = _rotate(dk1, dk2, frame, -1.0, D, PADDED, LOG_PERIOD)
    _store_halves(dk, offsets, 1, head, is_row, dk1, dk2, D, PADDED)


def launch_forward(q: Tensor, k: Tensor, v: Tensor, numbers: tuple[int, int, float, int, bool]) -> Tensor:
    """`(b t) n (heads d)` three times, of any strides -> the same, contiguous.

    numbers: t, heads, log2 of the longest period of the rotation (0: no rotation), radius of the window (-1: all
        frames), whether every frame sees the first one.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grid, num_rows, constants = _layout(q, numbers)
    if num_rows:
        strides = (*q.stride(), *k.stride(), *v.stride(), *out.stride()[:2])
        with _on_device(q):
            _forward[grid](q, k, v, out, *strides, q.shape[1], numbers[1], **constants)
    return out


def launch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, numbers: tuple[int, int, float, int, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous gradients of queries, keys and values from that of the output."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    grid, num_rows, constants = _layout(q, numbers)
    if num_rows:
        strides = (*q.stride(), *k.stride(), *v.stride(), *grad.stride(), *dq.stride()[:2])
        with _on_device(q):
            _backward[grid](q, k, v, grad, dq, dk, dv, *strides, q.shape[1], numbers[1], **constants)
    return dq, dk, dv


def _layout(q: Tensor, numbers: tuple[int, int, float, int, bool]) -> tuple[tuple[int], int, dict]:
    """Grid, number of elements, and compile-time constants of the kernels."""
    num_frames, num_heads, log_period, radius, sees_first = numbers
    dim = q.shape[-1] // num_heads
    block = max(16, triton.next_power_of_2(num_frames))
    padded = max(16, triton.next_power_of_2(dim // 2))
    num_clips = q.shape[0] // num_frames
    grid = (num_clips * num_heads * triton.cdiv(q.shape[1], block // num_frames),)
    constants = {
        "T": num_frames, "D": dim, "PADDED": padded, "BLOCK": block, "LOG_PERIOD": log_period, "RADIUS": radius,
        "SEES_FIRST": sees_first, "PRECISION": _precision(q), "SCALE": dim**-0.5,
        "num_warps": max(1, min(8, block * padded // 512)),
    }  # fmt: skip
    return grid, q.numel(), constants


def _precision(q: Tensor) -> str:
    if not q.is_cuda:
        return "interpreted"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _on_device(q: Tensor) -> torch.cuda.device:
    """Makes the GPU of the tensors the current one, to which kernels are launched; no effect on a CPU."""
    return torch.cuda.device(q.device.index if q.is_cuda else -1)
