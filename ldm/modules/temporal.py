"""How time enters the network: a convolution over frames after each image convolution, and attention over frames.

Both follow Singer et al. 2022, "Make-A-Video" (section 3.2). The convolution is initialised to the identity, the output
of the attention to zero, so an image network with fresh temporal layers generates the same images. Attention over
frames takes positions by rotating queries and keys (Su et al. 2021, "RoFormer"), which has no parameters and is defined
for any number of frames. Shapes, here and in the rest of the network:

    b clips   t frames   c channels   h w height and width   n tokens   d width of a token or of an attention head

Frames are folded into the batch, `(b t) c h w`; their number is an argument of every call. None: a batch of images,
which temporal layers leave alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.backends import attend, choose, options
from ldm.modules.backends.interface import Frames
from ldm.modules.nn import AttentionProjections, angles_of_frames, at_each_pixel, is_smaller_than_kernel, zeroed

MAX_PERIOD = 10000.0  # of the slowest rotation by position, in frames over 2 pi


def is_temporal(name: str) -> bool:
    """True for names of tensors of temporal layers, which an image checkpoint lacks."""
    return ".temporal." in name


class TemporalConv(nn.Conv1d):
    """Convolution over the frames of each pixel, initialised to the identity: `(b t) c h w` -> `(b t) c h w`.

    kernel_size: odd; the clip is padded with zeros, so any number of frames is kept.

    With `changes_only` (see `see_changes_only`) all taps are shifted equally until they sum to the identity, and the
    clip is padded with its first and last frame: equal frames come out unchanged.
    """

    changes_only = False

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(
                f"temporal_kernel_size: expected an odd number of frames (an even kernel would change how many there "
                f"are), found {kernel_size}"
            )
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2)
        nn.init.dirac_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        # In channels-last memory both rearrangements are views, and the kernel is a 2-D one that spans frames only.
        height = x.shape[-2]
        x = x.unflatten(0, (-1, num_frames)).transpose(1, 2).flatten(3)  # b c t (h w)
        weight, padding = self.weight, self.padding[0]
        if self.changes_only:
            surplus = weight.sum(-1) - torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
            weight = weight - surplus[..., None] / weight.shape[-1]
            first, last = (x[:, :, end].expand(-1, -1, padding, -1) for end in (slice(None, 1), slice(-1, None)))
            x, padding = torch.cat([first, x, last], dim=2), 0
        is_small = is_smaller_than_kernel(x, weight)
        x = F.conv2d(x.contiguous() if is_small else x, weight.unsqueeze(-1), self.bias, padding=(padding, 0))
        x = x.transpose(1, 2).flatten(0, 1).unflatten(2, (height, -1))  # (b t) c h w
        return x.contiguous(memory_format=torch.channels_last) if is_small else x


class PseudoConv3d(nn.Conv2d):
    """A 2-D convolution on each frame, then a 1-D one over the frames: `(b t) c h w` -> `(b t) c' h' w'`.

    It keeps the parameter names of the image convolution and adds the child `temporal`.

    kernel_size, temporal_kernel_size: odd numbers of pixels and of frames; None: no temporal convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        temporal_kernel_size: int | None = 3,
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"kernel_size: expected an odd number of pixels, found {kernel_size}")
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2)
        self.temporal = None if temporal_kernel_size is None else TemporalConv(out_channels, temporal_kernel_size)

    def forward(self, x: Tensor, num_frames: int | None = None) -> Tensor:
        x = self._within_frames(x)
        if num_frames is None or self.temporal is None:
            return x
        return self.temporal(x, num_frames)

    def _within_frames(self, x: Tensor) -> Tensor:
        is_linear = self.kernel_size == (1, 1) and self.stride == (1, 1)
        if is_linear and x.is_contiguous(memory_format=torch.channels_last):  # a convolution would copy its input
            return at_each_pixel(self, x)
        if is_smaller_than_kernel(x, self.weight):
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(x)


def rotate_by_position(x: Tensor, max_period: float = MAX_PERIOD) -> Tensor:
    """Rotate pairs of channels by angles proportional to the frame's index: `... t d` -> `... t d`, d even.

    The product of a rotated query and a rotated key depends on their distance in frames alone.
    """
    num_frames, dim = x.shape[-2:]
    angles = angles_of_frames(num_frames, dim, max_period, x.device)
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    rotated = torch.addcmul(first * cosine, second, sine, value=-1), torch.addcmul(second * cosine, first, sine)
    return torch.cat(rotated, dim=-1)


def see_changes_only(network: nn.Module, wanted: bool = True) -> None:
    """If `wanted`, restrict the temporal layers of `network` to changes of features between frames.

    A clip of equal frames is then treated exactly as images: the colours of the training clips cannot leak into other
    images through temporal layers. Their biases and the keys of these are removed.
    """
    for layer in network.modules() if wanted else ():
        if isinstance(layer, TemporalConv | TemporalAttention):
            layer.changes_only = True
            owner = layer if isinstance(layer, TemporalConv) else layer.to_out
            owner.register_parameter("bias", None)


class TemporalAttention(AttentionProjections):
    """Self-attention of each pixel over the frames of its clip, initialised to zero: `(b t) n c` -> the same.

    Its output is added to its input. It never sees the text.

    dim: channels, a multiple of 2 * num_heads.  backend: see `backends`.
    local: an odd number of frames that a frame attends to, itself in the middle; None: all.  sees_first: it also
        attends to the first frame of the clip.  positions: whether attention depends on the distance of frames.

    With `changes_only` (see `see_changes_only`) a frame's own value is subtracted from the output.
    """

    changes_only = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        backend: str = "sdpa",
        local: int | None = None,
        sees_first: bool = False,
        positions: bool = True,
    ) -> None:
        super().__init__()
        if dim % (2 * num_heads):
            raise UserError(
                f"TemporalAttention: expected a width that is a multiple of {2 * num_heads} (2 x {num_heads} heads: "
                f"positions rotate pairs of channels), found {dim}"
            )
        self.window = check_window(local, sees_first, backend)
        self.num_heads = num_heads
        self.backend = backend
        self.positions = positions
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = zeroed(nn.Linear(dim, dim))

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        q, k, v = self.project(self.norm(x))
        is_local = self.window is not None and num_frames > self.window.radius + 1
        window = (self.window.radius, self.window.sees_first) if is_local else (-1, False)
        frames = Frames(num_frames, self.num_heads, MAX_PERIOD if self.positions else 0.0, *window)
        backend = choose(self.backend, frames.case(q), over_frames=True)
        run = self._attend_rows if backend is None else backend.run
        x = run(q, k, v, frames)
        return self.to_out(x - v if self.changes_only else x)

    def _attend_rows(self, q: Tensor, k: Tensor, v: Tensor, frames: Frames) -> Tensor:
        """Attention with the frames of each pixel and head as one row."""
        shape = {"t": frames.num_frames, "heads": self.num_heads}
        num_tokens = q.shape[1]
        q, k, v = (rearrange(x, "(b t) n (heads d) -> (b n) heads t d", **shape) for x in (q, k, v))
        if self.positions:
            q, k = rotate_by_position(q), rotate_by_position(k)
        is_local = frames.radius >= 0
        x = attend_locally(q, k, v, self.window, self.backend) if is_local else attend(q, k, v, self.backend)
        return rearrange(x, "(b n) heads t d -> (b t) n (heads d)", n=num_tokens)


@dataclass(frozen=True)
class FrameWindow:
    """The frames that a frame attends to: `num_frames`, odd, centred on itself, and the first one if `sees_first`."""

    num_frames: int
    sees_first: bool

    @property
    def radius(self) -> int:
        return self.num_frames // 2


def check_window(local: int | None, sees_first: bool, backend: str) -> FrameWindow | None:
    """The window of `temporal_attention` in a config, None for all frames. Raises `UserError`."""
    where = "unet_config.params.temporal_attention"
    if local is None:
        if sees_first:
            raise UserError(f"{where}.sees_first: means nothing without {where}.local; every frame sees the first one")
        return None
    if isinstance(local, bool) or not isinstance(local, int) or local < 1 or local % 2 == 0:
        raise UserError(
            f"{where}.local: expected an odd number of frames (as many before as after) or null, found {local!r}"
        )
    if backend not in options(takes_mask=True):
        raise UserError(
            f"{where}.local: expected attention_backend to be one of {', '.join(options(takes_mask=True))}, which can "
            f"leave frames out, found '{backend}'"
        )
    return FrameWindow(local, sees_first)


def attend_locally(q: Tensor, k: Tensor, v: Tensor, window: FrameWindow, backend: str = "sdpa") -> Tensor:
    """`attend` where each frame sees `window`, in blocks of its size: `b heads t d` three times -> `b heads t d`."""
    num_frames, num_heads, size = q.shape[-2], q.shape[1], window.num_frames
    num_blocks = -(-num_frames // size)
    surplus = num_blocks * size - num_frames
    queries = rearrange(F.pad(q, (0, 0, 0, surplus)), "b heads (n i) d -> b (heads n) i d", n=num_blocks)
    keys, values = (_around_blocks(x, window, surplus) for x in (k, v))
    mask = repeat(_seen(num_frames, num_blocks, window, q.device), "n i j -> 1 (heads n) i j", heads=num_heads)
    out = attend(queries, keys, values, backend, mask)
    return rearrange(out, "b (heads n) i d -> b heads (n i) d", n=num_blocks)[..., :num_frames, :]


def _around_blocks(x: Tensor, window: FrameWindow, surplus: int) -> Tensor:
    """The frames that a block of queries may see, `b heads t d` -> `b (heads n) j d`: from `radius` before its first to
    `radius` after its last, zeros beyond the clip, and at the end the first frame of the clip if it is seen."""
    radius, size = window.radius, window.num_frames
    padded = F.pad(x, (0, 0, radius, radius + surplus))
    around = rearrange(padded.unfold(-2, size + 2 * radius, size), "b heads n d j -> b heads n j d")
    if window.sees_first:
        first = repeat(x[..., :1, :], "b heads 1 d -> b heads n 1 d", n=around.shape[2])
        around = torch.cat([around, first], dim=-2)
    return rearrange(around, "b heads n j d -> b (heads n) j d")


def _seen(num_frames: int, num_blocks: int, window: FrameWindow, device: torch.device) -> Tensor:
    """Which keys of its block each query sees: bool `n i j`."""
    radius, size = window.radius, window.num_frames
    starts = size * torch.arange(num_blocks, device=device)[:, None, None]
    query = starts + torch.arange(size, device=device)[:, None]
    key = starts - radius + torch.arange(size + 2 * radius, device=device)
    is_near = (key - query).abs() <= radius
    # Queries beyond the end are cut off later; they see something all the same, so the sum of their softmax is not 0.
    seen = is_near & (key >= 0) & ((key < num_frames) | (query >= num_frames))
    if window.sees_first:
        seen = torch.cat([seen, query > radius], dim=-1)  # nearer ones see it already
    return seen
