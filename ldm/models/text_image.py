"""Training of a small CLIP: its text half becomes the text encoder of small models (Radford et al. 2021).

Frames and captions are embedded, and each frame is trained to be nearest to its own caption within a batch. The text
network is that of `ldm.modules.encoders.CLIPTextEmbedder`; a checkpoint holds it under Stable Diffusion's names, so
`cond_stage_config.params.ckpt_path` reads it unchanged, and beside it what only training needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.world.frames import DrawnBatch
from ldm.errors import UserError
from ldm.models.small import SmallModelTraining, check_share
from ldm.modules.encoders import CLIPTextEmbedder
from ldm.modules.frame_tower import FrameTower

START_SCALE, MOST_SCALE = 1 / 0.07, 100.0  # of the cosines: initial value and bound of the paper
MOST_STRAY = 3  # random words in one caption
OF_TRAINING = "text_image"  # checkpoint key of the tensors that only training needs


class TextImageModel(SmallModelTraining):
    """A text network and an image network trained contrastively: `DrawnBatch` in, a text encoder out.

    text_config, tokenizer, max_length: the text network, see `CLIPTextEmbedder`.
    embed_dim: width of the embeddings.
    stray_words: share of the training captions with one to three random words inserted, so prompts may have words that
        no caption has.
    learning_rate, warmup_steps, cooldown_steps, seed, config: of `SmallModelTraining`.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the keys of the config
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
        super().__init__(learning_rate, warmup_steps, cooldown_steps, seed, config)
        check_share("stray_words", stray_words)
        self.text = CLIPTextEmbedder(text_config, tokenizer, max_length)
        self.text.network.requires_grad_(True)
        _ = self.text.tokenizer  # raises here if it is missing, before any frame is rendered
        self.image = FrameTower()
        self.text_head = nn.Linear(self.text.network.config.hidden_size, embed_dim, bias=False)
        self.image_head = nn.Linear(self.image.width, embed_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(START_SCALE)))
        self.stray_words = stray_words
        self.held_out: list[tuple[Tensor, Tensor, Tensor]] = []  # embeddings of frames and captions, looks

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Token ids -> unit vectors, from the output at the end token: `b n` -> `b e`."""
        return F.normalize(self.text_head(self.text.network(input_ids=tokens).pooler_output).float(), dim=-1)

    def embed_frames(self, pixels: Tensor) -> Tensor:
        """Frames in [-1, 1] -> unit vectors: `b 3 h w` -> `b e`."""
        return F.normalize(self.image_head(self.image(pixels)).float(), dim=-1)

    def training_step(self, batch: DrawnBatch, batch_idx: int) -> Tensor:
        """The contrastive loss of a batch."""
        captions = _captions(batch)
        tokens = self.text.tokenize(captions)
        end = self.text.network.config.eos_token_id
        tokens = with_stray_words(
            tokens, end, self.stray_words, [(self.seed, position) for position in batch.positions]
        )
        frames, texts = self.embed_frames(batch.pixels), self.embed_text(tokens.to(self.device))
        loss = contrastive_loss(frames, texts, captions, self.log_scale.exp().clamp(max=MOST_SCALE))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: DrawnBatch, batch_idx: int) -> None:
        """Keep the embeddings of held-out frames and captions; `on_validation_epoch_end` compares all with all."""
        tokens = self.text.tokenize(_captions(batch)).to(self.device)
        self.held_out.append((self.embed_frames(batch.pixels), self.embed_text(tokens), batch.looks))

    def on_validation_epoch_end(self) -> None:
        """Log `val/retrieval`, the share of held-out frames whose nearest caption is of their look, and the reverse,
        `val/retrieval_of_frames`; chance level is 1 / number of looks."""
        if not self.held_out:
            return
        frames, texts, looks = (torch.cat(parts) for parts in zip(*self.held_out, strict=True))
        self.held_out = []
        agreement = frames @ texts.T
        self.log("val/retrieval", (looks[agreement.argmax(1)] == looks).float().mean(), prog_bar=True)
        self.log("val/retrieval_of_frames", (looks[agreement.argmax(0)] == looks).float().mean())

    def configure_optimizers(self) -> dict[str, Any]:
        return self.adamw(self.parameters(), betas=(0.9, 0.98), weight_decay=0.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the text network under the names of Stable Diffusion's files, and the rest beside it."""
        checkpoint[OF_TRAINING] = {
            name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("text.")
        }
        checkpoint["state_dict"] = self.text.compvis_state_dict()
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the names that Lightning expects."""
        self.text.load_compvis_state_dict(checkpoint["state_dict"], where="text model checkpoint")
        checkpoint["state_dict"] = self.state_dict() | checkpoint[OF_TRAINING]


def contrastive_loss(frames: Tensor, texts: Tensor, captions: Sequence[str], scale: Tensor | float) -> Tensor:
    """Cross-entropy of each frame over the captions and of each caption over the frames, the mean of both.

    frames, texts: unit vectors `b e` in the same order. All copies of a caption in the batch are equally right.
    """
    logits = scale * frames @ texts.T
    same = torch.tensor([[float(one == other) for other in captions] for one in captions], device=logits.device)
    share = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, share) + F.cross_entropy(logits.T, share)) / 2


def with_stray_words(tokens: Tensor, end: int, share: float, seeds: Sequence[tuple[int, int]]) -> Tensor:
    """Captions with one to three random words inserted into a `share` of them: token ids, int64 `b n` -> same.

    end: id of the end token, which also pads; ids from `end` - 1 on are special tokens, not words.
    seeds: one for each caption. Where there is no room, the last words are lost.
    """
    changed = tokens.clone()
    for row, seed in zip(changed, seeds, strict=True):
        random = np.random.default_rng(seed)
        if random.random() >= share:
            continue
        ids = row.tolist()
        length = ids.index(end)
        for _ in range(random.integers(1, MOST_STRAY + 1)):
            ids.insert(int(random.integers(1, length + 1)), int(random.integers(end - 1)))
            length += 1
        row[:-1] = torch.tensor(ids[: len(row) - 1])
    return changed


def _captions(batch: Any) -> list[str]:
    if not isinstance(batch, DrawnBatch):
        raise UserError(
            f"data: the text model learns from frames with captions, found {type(batch).__name__}; use "
            "ldm.data.world.frames.DriveFrameDataModule"
        )
    return batch.captions
