"""The two frozen encoders at work: frames to moments, captions to embeddings, and moments back to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from omegaconf import DictConfig

from ldm import checkpoint
from ldm.checkpoint_names import FIRST_STAGE_PREFIX, TEXT_PREFIX
from ldm.modules.posterior import posterior_mean
from ldm.video import from_uint8, to_uint8

KEPT_CAPTIONS = 256  # embeddings of the latest captions; many clips share one


def identities(config: DictConfig) -> tuple[str, str]:
    """What the autoencoder and the text encoder that a config names are, by their weights."""
    tensors = checkpoint.encoder_tensors(config)
    first_stage, text_encoder = (
        checkpoint.identity({n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)})
        for prefix in (FIRST_STAGE_PREFIX, TEXT_PREFIX)
    )
    return first_stage, text_encoder


class Encoders:
    """The autoencoder and the text encoder that a config names, on the best device there is."""

    def __init__(self, config: DictConfig) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        first_stage, text_encoder = checkpoint.load_encoders(config)
        self.first_stage, self.text_encoder = first_stage.to(self.device).eval(), text_encoder.to(self.device).eval()
        self.context = lru_cache(KEPT_CAPTIONS)(self._context)

    @torch.inference_mode()
    def moments(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Frames uint8 `h w 3` -> moments float16 `t 2c h w`."""
        moments = self.first_stage.encode(from_uint8(frames).to(self.device))
        return moments.half().cpu().numpy()

    @torch.inference_mode()
    def pictures(self, moments: np.ndarray) -> np.ndarray:
        """Moments `t 2c h w` -> what the autoencoder makes of them, frames uint8 `t h w 3`."""
        means = posterior_mean(torch.from_numpy(moments.copy()).to(self.device).float())
        return np.concatenate([to_uint8(self.first_stage.decode(mean[None])) for mean in means])

    @torch.inference_mode()
    def _context(self, caption: str) -> np.ndarray:
        """A caption -> its embedding, float16 `n d`."""
        return self.text_encoder.encode([caption])[0].half().cpu().numpy()
