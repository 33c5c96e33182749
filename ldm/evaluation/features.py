"""Features for Frechet distances: of frames and clips by the style classifier, of motion, and by I3D.

The first three need no weights from elsewhere and know the procedural world. FVD uses an I3D network in a local
TorchScript file (Unterthiner et al. 2018); nothing is downloaded. Two kinds of file are supported: networks that
rescale and resize when called with `SWITCHES` (the form in which the converted original circulates), and networks that
take 224x224 pixels in [-1, 1]. Distances by different extractors, files or clip lengths do not compare.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from ldm.data.preparing.parts import hash_file
from ldm.errors import UserError
from ldm.evaluation.flow import Motion
from ldm.evaluation.look_judge import StyleClassifier

GRID = 4  # cells across and down
NUM_FRAMES, SIDE = 16, 224  # of a clip for I3D
SWITCHES = {"rescale": True, "resize": True, "return_features": True}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extractor:
    """`extract` makes feature vectors `n d` of a clip's frames uint8 `t h w 3` and motion; the rest describes it.

    places: decimals of a distance worth printing.
    """

    title: str
    name: str
    formula: str
    blind_to: str
    places: int
    extract: Callable[[np.ndarray, Motion], np.ndarray]


def style_extractors(classifier: StyleClassifier) -> dict[str, Extractor]:
    """Extractors of frames and of clips by the style classifier."""
    return {
        "frechet_frames": Extractor(
            "frames",
            classifier.name,
            "each frame's features, before the last layer of the style classifier",
            "all motion, and the order of frames: a reversed clip has distance 0 from itself",
            2,
            lambda frames, motion: classifier.features(frames),
        ),
        "frechet_clips": Extractor(
            "clips",
            f"{classifier.name}, over time",
            "of each clip the mean over frames of the style classifier's features, and their root mean square change "
            "from one frame to the next",
            "the direction of time: a reversed clip has the same features",
            2,
            lambda frames, motion: features_over_time(classifier.features(frames)),
        ),
    }


MOTION_ON_A_GRID = Extractor(
    "motion",
    f"flow on a grid of {GRID} by {GRID}",
    "of each clip the mean and the standard deviation over time of the flow F in each cell, in pixels, over its "
    "texture (0 in a cell without texture)",
    "what the clip shows; motion within a cell",
    0,
    lambda frames, motion: flow_on_a_grid(motion),
)


def features_over_time(features: np.ndarray) -> np.ndarray:
    """Features of a clip's frames `t d` -> `1 2d`: their mean, and their root mean square change between frames."""
    change = np.sqrt((np.diff(features, axis=0) ** 2).mean(axis=0))
    return np.concatenate([features.mean(axis=0), change])[None]


def flow_on_a_grid(motion: Motion) -> np.ndarray:
    """Motion of `p` pairs of frames -> `1 (2 cells 2)`: mean and standard deviation over time of the flow in cells."""
    seen = motion.textured[..., None].astype(np.float32)
    flows, counts = (_sum_cells(part) for part in (motion.flow * seen, seen))
    cells = flows / np.maximum(counts, 1)
    return np.concatenate([cells.mean(axis=0).ravel(), cells.std(axis=0).ravel()])[None]


def _sum_cells(values: np.ndarray) -> np.ndarray:
    """`p h w c` -> `p GRID GRID c`."""
    for axis, size in ((1, values.shape[1]), (2, values.shape[2])):
        values = np.add.reduceat(values, np.arange(GRID) * size // GRID, axis=axis)
    return values


def load_i3d(path: Path | str) -> Extractor:
    """Load an I3D network, try it on noise and record which it is.

    Raises UserError for a file that is no TorchScript, a network that does not take clips, and features that are not
    one finite vector per clip.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: expected a TorchScript file with an I3D network (--i3d), found no such file")
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

    num_features = _try(path, extract)
    sha256 = hash_file(path)
    variant = "rescaling and resizing itself" if scales_itself else f"given {SIDE}x{SIDE} pixels in [-1, 1]"
    log.info("%s: sha256 %s, %s", path, sha256, variant)
    return Extractor(
        "FVD",
        f"I3D {path.name}, sha256 {sha256[:12]}, {variant}, {num_features} features",
        f"the network's features of the first {NUM_FRAMES} frames of each clip",
        "later frames; compare with published figures only where file, variant, frame rate and number of clips agree",
        1,
        extract,
    )


def _load(path: Path) -> tuple[torch.jit.ScriptModule, bool]:
    """The network, and whether it takes `SWITCHES`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is deprecated; the published files use it
            network = torch.jit.load(str(path), map_location="cpu")
        names = {argument.name for argument in network.forward.schema.arguments}
    except (RuntimeError, ValueError, AttributeError, EOFError) as error:
        raise UserError(
            f"{path}: expected an I3D network as TorchScript, found a file that torch.jit.load cannot read "
            f"({_last_line(error)}); fetch it again, or export it with torch.jit.script"
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
            f"({_last_line(error)}); give an I3D network"
        ) from None
    if found.ndim != 2 or len(found) != 1 or found.shape[1] < 2:
        raise UserError(f"{path}: expected features `b d` of a clip, found {list(found.shape)}; give an I3D network")
    if not np.isfinite(found).all():
        raise UserError(f"{path}: expected finite features, found NaN or infinity; fetch the file again")
    return found.shape[1]


def _last_line(error: Exception) -> str:
    """The message of a TorchScript error, which starts with a traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
