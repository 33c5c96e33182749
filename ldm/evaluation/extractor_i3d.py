"""FVD: Frechet distance of clips by an I3D network in a local TorchScript file (Unterthiner et al. 2018).

Nothing is ever downloaded. Two kinds of file are understood: those that scale and resize by themselves when told to
(`rescale`, `resize`, `return_features`; the form in which the converted original is passed on), and those that take
224x224 pixels in [-1, 1] and nothing else. Distances by different files, or of other than 16 frames, do not compare.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from ldm.data.parts import hash_file
from ldm.errors import UserError
from ldm.evaluation.extractors import Extractor
from ldm.evaluation.flow import Motion

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
