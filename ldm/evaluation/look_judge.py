"""The style classifier: a small network that names the style (look) of the procedural world that a frame shows.

Text alignment compares its answers with prompts; Frechet distances use its last features. `ldm.models.look_classifier`
trains it; the file records its accuracy on frames of held-out scenes.
"""

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

METADATA_KEY = "judge of looks"  # of the safetensors file
MAX_BLOCKS, MAX_WIDTH = 32, 4096
BATCH_SIZE = 128  # frames


@dataclass(frozen=True)
class StyleClassifier:
    """A trained style classifier.

    looks: names of its classes. accuracy: on held-out frames of the procedural world, 0 to 1; accuracy_damaged: on
    blurred, coarse, noisy and otherwise corrupted ones. steps: of its training. name: of its file, with the first
    digits of the file's SHA-256.
    """

    network: FrameClassifier
    looks: tuple[str, ...]
    accuracy: float
    accuracy_damaged: float
    steps: int
    name: str

    def predict(self, frames: np.ndarray) -> np.ndarray:
        """Index in `looks` of each frame: uint8 `t h w 3` of any size -> int64 `t`."""
        with torch.inference_mode():
            return self.network.head(torch.from_numpy(self.features(frames))).argmax(1).numpy()

    @torch.inference_mode()
    def features(self, frames: np.ndarray) -> np.ndarray:
        """Features before the last layer: uint8 `t h w 3` -> float32 `t d`."""
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
            raise UserError(
                f"style classifier: expected frames, uint8 t h w 3, found {frames.dtype} of shape {frames.shape}"
            )
        parts = [frames[first : first + BATCH_SIZE] for first in range(0, len(frames), BATCH_SIZE)]
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
    fields = {"looks": list(looks), "accuracy": accuracy, "accuracy_damaged": accuracy_damaged, "steps": steps}
    fields["widths"] = list(network.tower.widths)
    write_atomically(path, save(tensors, {METADATA_KEY: json.dumps(fields)}))


def load_style_classifier(path: Path | str) -> StyleClassifier:
    """Read a style classifier, on the CPU; raises UserError for any other file."""
    path = Path(path)
    fields, tensors = _read(path)
    try:
        widths, num_looks = fields["widths"], len(fields["looks"])
        if len(widths) > MAX_BLOCKS or num_looks > MAX_WIDTH or any(not 0 < width <= MAX_WIDTH for width in widths):
            raise ValueError(f"{num_looks} looks, widths {str(widths)[:80]}")
        network = FrameClassifier(num_looks, widths)
        network.load_state_dict(tensors)
        accuracies = float(fields["accuracy"]), float(fields["accuracy_damaged"])
        looks, steps = tuple(fields["looks"]), int(fields["steps"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: expected a style classifier, found one whose tensors and metadata do not match "
            f"({' '.join(str(error).split())[:200]}). Train it again with configs/drive/judge.yaml."
        ) from None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return StyleClassifier(network.requires_grad_(False).eval(), looks, *accuracies, steps, f"{path.stem} {digest}")


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Metadata and float32 tensors of a file."""
    if not path.is_file():
        raise UserError(
            f"{path}: expected a style classifier, found no such file. Train one with "
            "`python main.py --base configs/drive/judge.yaml -t`, or correct the path."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{path}: expected a style classifier as .safetensors, found another file ({error})") from None
    if METADATA_KEY not in metadata:
        raise UserError(
            f"{path}: expected a style classifier, found a .safetensors file of something else; the bundled one is "
            "models/drive/judge.safetensors"
        )
    try:
        fields = parse_json(metadata[METADATA_KEY])
    except ValueError as error:
        raise UserError(f"{path}: expected a style classifier, found one whose metadata is no JSON ({error})") from None
    return fields, tensors
