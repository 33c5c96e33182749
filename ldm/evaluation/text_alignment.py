"""Text alignment: does a clip show what its prompt says?

By the style classifier (`look_judge.py`): the share of frames with the style that the prompt names. Only for prompts
that name exactly one style of the procedural world; the rest of the prompt is ignored.
By CLIP (Radford et al. 2021), for any prompt: the cosine between prompt and frames. The weights are a local folder in
the format of transformers; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from ldm.data.world.captions import look_of_prompt
from ldm.errors import UserError
from ldm.evaluation.look_judge import StyleClassifier
from ldm.evaluation.motion import Measure, Reading
from ldm.files import parse_json

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

TITLE = "text alignment"
NO_PROMPT = "no prompt is known: neither the video nor a text file of its name beside it holds one"
CLIP_FILES = ("config.json", "vocab.json", "merges.txt")
# Image normalisation of the published models; a folder's preprocessor_config.json takes precedence.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class TextAlignment:
    """`read` measures a clip, uint8 RGB `t h w 3`, and its prompt, None if unknown; `description` names the model."""

    measure: Measure
    description: str
    read: Callable[[np.ndarray, str | None], Reading]


def style_alignment(classifier: StyleClassifier) -> TextAlignment:
    """The share of a clip's frames in which the classifier sees the style that the prompt names."""

    def read(frames: np.ndarray, prompt: str | None) -> Reading:
        if prompt is None:
            return Reading(None, NO_PROMPT)
        look = look_of_prompt(prompt)
        if look not in classifier.looks:
            return Reading(None, "the prompt names no style of the classifier, or several")
        return Reading(float(np.mean(classifier.predict(frames) == classifier.looks.index(look))))

    accuracy = f"{classifier.accuracy:.1%} accurate on held-out frames of the procedural world"
    measure = Measure(
        TITLE,
        "share of the frames in which the style classifier sees the style that the prompt names",
        f"0 to 1: 1 every frame has the style; by chance {1 / len(classifier.looks):.2f}",
        f"everything else in the prompt, and all motion; the classifier is {accuracy}",
        1,
        2,
    )
    return TextAlignment(measure, f"{TITLE} by {classifier.name}, {accuracy}", read)


def load_clip_alignment(folder: Path | str) -> TextAlignment:
    """The mean over a clip's frames of CLIP's cosine with the prompt; raises UserError unless `folder` holds a CLIP."""
    folder = Path(folder)
    if missing := [name for name in CLIP_FILES if not (folder / name).is_file()]:
        raise UserError(
            f"{folder}: expected a CLIP folder in the format of transformers (config.json, vocab.json, merges.txt, "
            f"weights), found no {', '.join(missing)}; write one with save_pretrained of model and tokenizer"
        )
    model, tokenizer = _load(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    mean, std = _normalisation(folder)
    side, max_tokens = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def read(frames: np.ndarray, prompt: str | None) -> Reading:
        if prompt is None:
            return Reading(None, NO_PROMPT)
        pixels = np.stack([_centre_crop(frame, side) for frame in frames]).astype(np.float32) / 255
        pixels = rearrange(torch.from_numpy((pixels - mean) / std), "t h w c -> t c h w").to(device)
        tokens = tokenizer([prompt], truncation=True, max_length=max_tokens, return_tensors="pt").to(device)
        found = model(pixel_values=pixels, **tokens)
        return Reading(float((found.image_embeds @ found.text_embeds.T).mean()))

    measure = Measure(
        TITLE,
        "mean over frames of the cosine between CLIP's embeddings of the frame and of the prompt",
        "-1 to 1; for the published models about 0.3 is full agreement and 0.15 none: compare with the true clips'",
        "all motion, the order of things and their number; the prompt beyond the model's token limit",
        1,
        3,
    )
    return TextAlignment(measure, f"{TITLE} by CLIP in {folder}", read)


def _load(folder: Path) -> tuple[CLIPModel, CLIPTokenizer]:
    from transformers import CLIPModel, CLIPTokenizer  # noqa: PLC0415 - takes seconds to import

    try:
        model, loaded = CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers does not say which exceptions it raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{folder}: expected a CLIP folder in the format of transformers, found one that cannot be loaded "
            f"({reason}); fetch it again"
        ) from None
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"{folder}: expected all weights of CLIP, found {len(missing)} missing, such as {missing[0]}; a text or "
            "image encoder alone is not enough"
        )
    return model, tokenizer


def _normalisation(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the colours that the model expects."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return np.float32(CLIP_MEAN), np.float32(CLIP_STD)
    try:
        given = parse_json(path.read_bytes())
        mean, std = (np.array(given[key], np.float32).reshape(3) for key in ("image_mean", "image_std"))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: expected image_mean and image_std, three numbers each, found something else ({error!r}); fetch "
            "it again"
        ) from None
    return mean, std


def _centre_crop(frame: np.ndarray, side: int) -> np.ndarray:
    """The central square of a frame at the model's size."""
    picture = Image.fromarray(frame)
    scale = side / min(picture.size)
    width, height = (max(side, round(length * scale)) for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture.crop((left, top, left + side, top + side)))
