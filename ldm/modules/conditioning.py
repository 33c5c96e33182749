"""What the network is told of a clip besides its caption: frames that are known, how noisy they are, the frame rate.

Each starts as nothing: the convolution over the known frames and the last layer of each embedding are zero, so that
the network they are added to gives what it gave. Known frames are told as in the public inpainting checkpoint of Stable
Diffusion, by more input channels: a mask, 1 where latents are to be made, and the known latents. What these are where
nothing is known is for the caller to say. The noise on known frames and its level are the conditioning augmentation of
Ho et al. 2021, "Cascaded Diffusion Models" (section 4). Shapes as in `temporal.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.nn import timestep_embedding, zeroed

OCTAVE = 100.0  # steps of the sinusoids' scale for a doubled frame rate


class Embedding(nn.Sequential):
    """Two layers on sinusoids of a number, zero at the start: `b` -> `b e`."""

    def __init__(self, channels: int, emb_channels: int) -> None:
        super().__init__(nn.Linear(channels, emb_channels), nn.SiLU(), zeroed(nn.Linear(emb_channels, emb_channels)))
        self.channels = channels

    def forward(self, numbers: Tensor) -> Tensor:
        return super().forward(timestep_embedding(numbers, self.channels).to(self[0].weight.dtype))


class ClipConditioning(nn.Module):
    """The three conditions; those left out have no parameters.

    num_latent_channels: of the latents, c; None for a network that takes no known frames.
    model_channels, emb_channels: of the network's first level and of its timestep embedding.
    fps, known_level: whether there are embeddings of the frame rate and of the noise level of the known latents.
    """

    def __init__(
        self, num_latent_channels: int | None, model_channels: int, emb_channels: int, fps: bool, known_level: bool
    ) -> None:
        super().__init__()
        if num_latent_channels is not None:
            self.known = zeroed(nn.Conv2d(num_latent_channels + 1, model_channels, 3, padding=1, bias=False))
        if fps:
            self.fps = Embedding(model_channels, emb_channels)
        if known_level:
            self.known_level = Embedding(model_channels, emb_channels)

    def embed(self, emb: Tensor, fps: Tensor | None, known_level: Tensor | None) -> Tensor:
        """The timestep embedding `b e` and what is added to it.

        fps: frames a second, `b`, above 0; known_level: diffusion step of the noise on known latents, 0 for none, `b`.
            None, or an embedding that was left out, adds nothing.
        """
        if fps is not None and hasattr(self, "fps"):
            emb = emb + self.fps(OCTAVE * torch.log2(fps.float()))
        if known_level is not None and hasattr(self, "known_level"):
            emb = emb + self.known_level(known_level)
        return emb


def build_conditioning(
    num_latent_channels: int | None, model_channels: int, emb_channels: int, fps: bool, known_level: bool
) -> nn.ModuleDict | None:
    """`ClipConditioning` of these arguments under the name `temporal`; None where there is nothing to be told."""
    if known_level and num_latent_channels is None:
        raise UserError(
            "known_level_embedding: expected a network that takes known frames, whose in_channels are 2 * out_channels "
            "+ 1 (9 for 4); set in_channels or leave the embedding out"
        )
    if num_latent_channels is None and not fps:
        return None
    arguments = (num_latent_channels, model_channels, emb_channels, fps, known_level)
    return nn.ModuleDict({"temporal": ClipConditioning(*arguments)})
