"""Training of a small CLIP: its text half becomes the text encoder of small models (Radford et al. 2021).

Frames and their captions get vectors, and each frame's is to lie nearest to its own caption's among those of a batch.
The text network is that of `ldm.modules.encoders.CLIPTextEmbedder`; a checkpoint holds it under Stable Diffusion's
names, so `cond_stage_config.params.ckpt_path` takes it as it is. The rest, which only training needs, lies beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.world.frames import DrawnBatch
from ldm.errors import UserError
from ldm.modules.encoders import CLIPTextEmbedder
from ldm.modules.frame_tower import FrameTower
from ldm.optim import rate_schedule

START_SCALE = 1 / 0.07  # cosines are multiplied by it; the paper's start and its bound
MOST_SCALE = 100.0
MOST_STRAY = 3  # unknown words in one caption
OF_TRAINING = "text_image"  # what only training needs, in a checkpoint


class TextImageModel(pl.LightningModule):
    """A text network and an image network that are trained to agree: `DrawnBatch` in, a text encoder out.

    text_config, tokenizer, max_length: the text network, see `CLIPTextEmbedder`.
    embed_dim: width of the vectors in which both are compared.
    stray_words: share of the training captions that get one to three words that mean nothing, so that prompts may have
        words that no caption has.
    learning_rate: highest rate; it rises over `warmup_steps` steps and falls over the last `cooldown_steps`.
    seed: of the stray words. config: of the run, kept in checkpoints.
    """

    keeps_averages = False  # the checkpoint's `state_dict` is the text network alone

    def __init__(  # noqa: PLR0913, PLR0917 - the words of the config
        self,
        text_config: Mapping[str, Any],
        tokenizer: str | None = None,
        max_length: int = 32,
        embed_dim: int = 64,
        stray_words: float = 0.25,
        learning_rate: float = 1e-3,
        warmup_steps: int = 50,
        cooldown_steps: int = 0,
        seed: int = 23,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= stray_words <= 1:
            raise UserError(f"model.params.stray_words: expected a share, 0 to 1, found {stray_words!r}")
        self.text = CLIPTextEmbedder(text_config, tokenizer, max_length)
        self.text.network.requires_grad_(True)
        _ = self.text.tokenizer  # missing, it says so before anything is drawn
        self.image = FrameTower()
        self.text_head = nn.Linear(self.text.network.config.hidden_size, embed_dim, bias=False)
        self.image_head = nn.Linear(self.image.width, embed_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(START_SCALE)))
        self.stray_words, self.seed, self.config = stray_words, seed, config
        self.learning_rate, self.warmup_steps, self.cooldown_steps = learning_rate, warmup_steps, cooldown_steps
        self.held_out: list[tuple[Tensor, Tensor, Tensor]] = []  # vectors of frames and captions, looks

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Token numbers -> unit vectors, from what the network makes of the end mark: `b n` -> `b e`."""
        return F.normalize(self.text_head(self.text.network(input_ids=tokens).pooler_output).float(), dim=-1)

    def embed_frames(self, pixels: Tensor) -> Tensor:
        """Frames in [-1, 1] -> unit vectors: `b 3 h w` -> `b e`."""
        return F.normalize(self.image_head(self.image(pixels)).float(), dim=-1)

    def training_step(self, batch: DrawnBatch, batch_idx: int) -> Tensor:
        """The loss of a batch, in which a frame is compared with every caption."""
        captions = _captions(batch)
        tokens = self.text.tokenize(captions)
        end = self.text.network.config.eos_token_id
        tokens = with_stray_words(tokens, end, self.stray_words, [(self.seed, place) for place in batch.positions])
        frames, texts = self.embed_frames(batch.pixels), self.embed_text(tokens.to(self.device))
        loss = contrastive_loss(frames, texts, captions, self.log_scale.exp().clamp(max=MOST_SCALE))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: DrawnBatch, batch_idx: int) -> None:
        """Keep the vectors of held-out frames and captions; `on_validation_epoch_end` compares all with all."""
        tokens = self.text.tokenize(_captions(batch)).to(self.device)
        self.held_out.append((self.embed_frames(batch.pixels), self.embed_text(tokens), batch.looks))

    def on_validation_epoch_end(self) -> None:
        """Log `val/retrieval`: of all held-out captions, is the one nearest to a frame of the frame's look? And the
        other way round, `val/retrieval_of_frames`. Shares; by chance one in the number of looks."""
        if not self.held_out:
            return
        frames, texts, looks = (torch.cat(parts) for parts in zip(*self.held_out, strict=True))
        self.held_out = []
        agreement = frames @ texts.T
        self.log("val/retrieval", (looks[agreement.argmax(1)] == looks).float().mean(), prog_bar=True)
        self.log("val/retrieval_of_frames", (looks[agreement.argmax(0)] == looks).float().mean())

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        scheduler = rate_schedule(optimizer, self.warmup_steps, self.cooldown_steps, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The text network under the names of Stable Diffusion's files; the rest beside it."""
        checkpoint[OF_TRAINING] = {
            name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("text.")
        }
        checkpoint["state_dict"] = self.text.compvis_state_dict()
        if self.config is not None:
            checkpoint["config"] = dict(self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave Lightning the names it looks for."""
        self.text.load_compvis_state_dict(checkpoint["state_dict"], where="text model checkpoint")
        checkpoint["state_dict"] = self.state_dict() | checkpoint[OF_TRAINING]


def contrastive_loss(frames: Tensor, texts: Tensor, captions: Sequence[str], scale: Tensor | float) -> Tensor:
    """Cross-entropy of each frame over the captions and of each caption over the frames, the mean of both.

    frames, texts: unit vectors `b e` in the same order. A caption that comes several times is equally right each time.
    """
    logits = scale * frames @ texts.T
    same = torch.tensor([[float(one == other) for other in captions] for one in captions], device=logits.device)
    share = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, share) + F.cross_entropy(logits.T, share)) / 2


def with_stray_words(tokens: Tensor, end: int, share: float, seeds: Sequence[tuple[int, int]]) -> Tensor:
    """Captions with one to three random words put between their own, in a `share` of them: int64 `b n` -> same.

    end: the number of the end mark, which also fills up; the two numbers below and from it on are marks and no words.
    seeds: of each caption, so that the same one always gets the same words. Where there is no room the end is lost.
    """
    changed = tokens.clone()
    for row, seed in zip(changed, seeds, strict=True):
        random = np.random.default_rng(seed)
        if random.random() >= share:
            continue
        words = row.tolist()
        length = words.index(end)
        for _ in range(random.integers(1, MOST_STRAY + 1)):
            words.insert(int(random.integers(1, length + 1)), int(random.integers(end - 1)))
            length += 1
        row[:-1] = torch.tensor(words[: len(row) - 1])
    return changed


def _captions(batch: Any) -> list[str]:
    if not isinstance(batch, DrawnBatch):
        raise UserError(
            f"data: the text model learns from frames with captions, found {type(batch).__name__}; use "
            "ldm.data.world.frames.DriveFrameDataModule"
        )
    return batch.captions
