"""The judge of looks: a small network that says which look of the drawn world a frame shows, and whose last features
Frechet distances are taken between. Its file says how often it was right on frames of scenes it had never seen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldm.errors import UserError
from ldm.files import parse_json, write_atomically
from ldm.modules.frame_tower import FrameClassifier
from ldm.video import from_uint8

METADATA_KEY = "judge of looks"  # where the metadata of its files has the words about it
MAX_BLOCKS, MAX_WIDTH = 32, 4096
AT_ONCE = 128  # frames


@dataclass(frozen=True)
class StyleClassifier:
    """A trained judge.

    looks: the names that its answers are places in. accuracy: share of held-out frames of the drawn world whose look it
    told; accuracy_damaged: the same of blurred, coarse, noisy and otherwise damaged ones. steps: of its training. name:
    of its file, with the beginning of the file's SHA-256.
    """

    network: FrameClassifier
    looks: tuple[str, ...]
    accuracy: float
    accuracy_damaged: float
    steps: int
    name: str

    def predict(self, frames: np.ndarray) -> np.ndarray:
        """The look of each frame, as its place in `looks`: uint8 `t h w 3` of any size -> int64 `t`."""
        with torch.inference_mode():
            return self.network.head(torch.from_numpy(self.features(frames))).argmax(1).numpy()

    @torch.inference_mode()
    def features(self, frames: np.ndarray) -> np.ndarray:
        """What the network makes of each frame before it answers: uint8 `t h w 3` -> float32 `t d`."""
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
            raise UserError(f"judge: expected frames, uint8 t h w 3, found {frames.dtype} of shape {frames.shape}")
        parts = [frames[first : first + AT_ONCE] for first in range(0, len(frames), AT_ONCE)]
        return np.concatenate([self.network.tower(from_uint8(part)).numpy() for part in parts])


def save_style_classifier(
    path: Path | str,
    network: FrameClassifier,
    looks: Sequence[str],
    accuracy: float,
    accuracy_damaged: float,
    steps: int,
) -> None:
    """Write a style classifier in half precision, atomically; see `StyleClassifier` for the fields."""
    tensors = {name: tensor.detach().cpu().half().contiguous() for name, tensor in network.state_dict().items()}
    words = {"looks": list(looks), "accuracy": accuracy, "accuracy_damaged": accuracy_damaged, "steps": steps}
    words["widths"] = list(network.tower.widths)
    write_atomically(path, save(tensors, {METADATA_KEY: json.dumps(words)}))


def load_style_classifier(path: Path | str) -> StyleClassifier:
    """A judge from its file, on the CPU; raises UserError for a file that is none."""
    path = Path(path)
    words, tensors = _read(path)
    try:
        widths, num_looks = words["widths"], len(words["looks"])
        if len(widths) > MAX_BLOCKS or num_looks > MAX_WIDTH or any(not 0 < width <= MAX_WIDTH for width in widths):
            raise ValueError(f"{num_looks} looks, widths {str(widths)[:80]}")
        network = FrameClassifier(num_looks, widths)
        network.load_state_dict(tensors)
        accuracies = float(words["accuracy"]), float(words["accuracy_damaged"])
        looks, steps = tuple(words["looks"]), int(words["steps"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: expected a judge of looks, found one whose tensors or words do not fit together "
            f"({' '.join(str(error).split())[:200]}). Train it again with configs/drive/judge.yaml."
        ) from None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return StyleClassifier(network.requires_grad_(False).eval(), looks, *accuracies, steps, f"{path.stem} {digest}")


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The words and the tensors, float32, of a file."""
    if not path.is_file():
        raise UserError(
            f"{path}: expected a judge of looks, found no such file. Train one with "
            "`python main.py --base configs/drive/judge.yaml -t`, or correct the path."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{path}: expected a judge of looks in a .safetensors file, found another ({error})") from None
    if METADATA_KEY not in metadata:
        raise UserError(
            f"{path}: expected a judge of looks, found a .safetensors file of something else; the project's own is "
            "models/drive/judge.safetensors"
        )
    try:
        words = parse_json(metadata[METADATA_KEY])
    except ValueError as error:
        raise UserError(f"{path}: expected a judge of looks, found one whose words are no JSON ({error})") from None
    return words, tensors
