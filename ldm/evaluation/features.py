"""What Frechet distances are taken between: features of frames and of clips, by our own judge of looks and from motion.

They are cheap, need no weights from elsewhere and know the drawn world; published figures are made with other
extractors (`extractor_i3d.py`), and no two extractors' distances compare.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from ldm.data.preparing.parts import hash_file
from ldm.errors import UserError
from ldm.evaluation.flow import Motion

GRID = 4  # cells across and down


class StyleClassifier(Protocol):
    """What is needed of a judge (`judge.py`): it tells the looks of frames uint8 `t h w 3` and has features of them."""

    looks: tuple[str, ...]
    accuracy: float
    name: str

    def predict(self, frames: np.ndarray) -> np.ndarray:
        """Places in `looks`, `t`."""

    def features(self, frames: np.ndarray) -> np.ndarray:
        """One vector a frame, `t d` float32."""


@dataclass(frozen=True)
class Extractor:
    """Makes feature vectors `n d` of a clip's frames uint8 `t h w 3` and motion, and says how.

    places: decimals of a distance worth printing; shortest: frames that a clip must have.
    """

    title: str
    name: str
    formula: str
    blind_to: str
    places: int
    extract: Callable[[np.ndarray, Motion], np.ndarray]
    shortest: int = 2


def own_extractors(judge: StyleClassifier) -> dict[str, Extractor]:
    """Those of frames and of clips by the judge."""
    return {
        "frechet_frames": Extractor(
            "frames",
            judge.name,
            "each frame's features, the judge's last layer before its answer",
            "all motion, and the order of frames: a clip played backwards is at 0 from itself",
            2,
            lambda frames, motion: judge.features(frames),
        ),
        "frechet_clips": Extractor(
            "clips",
            f"{judge.name}, over time",
            "of each clip the mean over frames of the judge's features, and beside it their root mean square change "
            "from one frame to the next",
            "the direction of time: a clip played backwards has the same features",
            2,
            lambda frames, motion: features_over_time(judge.features(frames)),
        ),
    }


MOTION_ON_A_GRID = Extractor(
    "motion",
    f"flow on a grid of {GRID} by {GRID}",
    "of each clip the mean and the standard deviation over time of the flow F in each cell, in pixels, over its "
    "texture (0 in a cell without any)",
    "what the clip shows; how things move within a cell",
    0,
    lambda frames, motion: flow_on_a_grid(motion),
)


def features_over_time(features: np.ndarray) -> np.ndarray:
    """Features of a clip's frames `t d` -> `1 2d`: their mean, and their root mean square change between frames."""
    change = np.sqrt((np.diff(features, axis=0) ** 2).mean(axis=0))
    return np.concatenate([features.mean(axis=0), change])[None]


def flow_on_a_grid(motion: Motion) -> np.ndarray:
    """Motion of `p` pairs of frames -> `1 (2 cells 2)`: the flow's mean and standard deviation over time, by cells."""
    seen = motion.textured[..., None].astype(np.float32)
    flows, counts = (_sum_cells(part) for part in (motion.flow * seen, seen))
    cells = flows / np.maximum(counts, 1)
    return np.concatenate([cells.mean(axis=0).ravel(), cells.std(axis=0).ravel()])[None]


def _sum_cells(values: np.ndarray) -> np.ndarray:
    """`p h w c` -> `p GRID GRID c`."""
    for axis, size in ((1, values.shape[1]), (2, values.shape[2])):
        values = np.add.reduceat(values, np.arange(GRID) * size // GRID, axis=axis)
    return values


NUM_FRAMES, SIDE = 16, 224
SWITCHES = {"rescale": True, "resize": True, "return_features": True}

log = logging.getLogger(__name__)


def load_i3d(path: Path | str) -> Extractor:
    """Load the file, try it on noise, and say which it is.

    Raises UserError for a file that is no TorchScript, a network that does not take clips, and features that are not
    one finite vector a clip.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; --i3d expects a TorchScript file with an I3D network")
    network, scales_itself = _load(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device).eval()

    @torch.inference_mode()
    def extract(frames: np.ndarray, motion: Motion | None) -> np.ndarray:
        clip = rearrange(torch.from_numpy(frames[:NUM_FRAMES].copy()), "t h w c -> 1 c t h w").float().to(device)
        if scales_itself:
            return network(clip, **SWITCHES).float().cpu().numpy()
        size = (clip.shape[2], SIDE, SIDE)
        return network(F.interpolate(clip, size, mode="trilinear") / 127.5 - 1).float().cpu().numpy()

    found = _try(path, extract)
    sha256 = hash_file(path)
    variant = "which scales and resizes by itself" if scales_itself else f"given {SIDE}x{SIDE} pixels in [-1, 1]"
    name = f"I3D {path.name}, sha256 {sha256[:12]}, {variant}, {found} features"
    log.info("%s: sha256 %s, %s", path, sha256, variant)
    return Extractor(
        "FVD",
        name,
        f"the network's features of the first {NUM_FRAMES} frames of each clip",
        "what comes after; compares with published figures only where file, variant, frame rate and number of clips "
        "are the same",
        1,
        extract,
        NUM_FRAMES,
    )


def _load(path: Path) -> tuple[torch.jit.ScriptModule, bool]:
    """The network, and whether it has the switches."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript altogether; the published files are it
            network = torch.jit.load(str(path), map_location="cpu")
        names = {argument.name for argument in network.forward.schema.arguments}
    except (RuntimeError, ValueError, AttributeError, EOFError) as error:
        raise UserError(
            f"{path}: expected an I3D network as TorchScript, found a file that torch.jit.load cannot read "
            f"({_last_line(error)}); fetch it anew, or export it with torch.jit.script"
        ) from None
    return network, set(SWITCHES) <= names


def _try(path: Path, extract: Callable[[np.ndarray, Motion | None], np.ndarray]) -> int:
    """The number of features of a clip of noise."""
    noise = np.random.default_rng(0).integers(0, 255, (NUM_FRAMES, 64, 64, 3), dtype=np.uint8)
    try:
        found = extract(noise, None)
    except (torch.jit.Error, RuntimeError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path}: expected a network that takes clips `b 3 {NUM_FRAMES} h w`, found one that fails on one "
            f"({_last_line(error)}); give an I3D"
        ) from None
    if found.ndim != 2 or len(found) != 1 or found.shape[1] < 2:
        raise UserError(f"{path}: expected features `b d` of a clip, found {list(found.shape)}; give an I3D")
    if not np.isfinite(found).all():
        raise UserError(f"{path}: expected finite features, found NaN or infinity; the file's weights are broken")
    return found.shape[1]


def _last_line(error: Exception) -> str:
    """TorchScript tells where first and what last."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
