"""Whether a clip shows what its prompt says, by our own judge of looks: the share of its frames that have the look.

Only for prompts that name one look of the drawn world; other words - the road's shape, the speed - are not asked for.
CLIP judges any prompt (`agreement_clip.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from ldm.data.world.captions import look_of_prompt
from ldm.errors import UserError
from ldm.evaluation.features import StyleClassifier
from ldm.evaluation.motion import Measure, Reading
from ldm.files import parse_json

NO_PROMPT = "no prompt is known: neither the video nor a text file of its name beside it holds one"


@dataclass(frozen=True)
class TextAlignment:
    """Reads a clip, uint8 RGB `t h w 3`, against its prompt; None where no prompt is known. `told` says what judges."""

    measure: Measure
    told: str
    read: Callable[[np.ndarray, str | None], Reading]


def style_alignment(judge: StyleClassifier) -> TextAlignment:
    """The share of a clip's frames whose look, to the judge, is the one that the prompt names."""

    def read(frames: np.ndarray, prompt: str | None) -> Reading:
        if prompt is None:
            return Reading(None, NO_PROMPT)
        look = look_of_prompt(prompt)
        if look not in judge.looks:
            return Reading(None, "the prompt names none of the judge's looks, or several")
        return Reading(float(np.mean(judge.predict(frames) == judge.looks.index(look))))

    measure = Measure(
        "text agreement",
        "share of the frames in which the judge sees the look that the prompt names",
        f"0 to 1: 1 every frame has the look; by chance {1 / len(judge.looks):.2f}",
        f"everything else in the prompt, and all motion; the judge itself is right in {judge.accuracy:.1%} of unseen "
        "frames of the drawn world",
        1,
        2,
    )
    told = f"text agreement by {judge.name}, right in {judge.accuracy:.1%} of unseen frames of the drawn world"
    return TextAlignment(measure, told, read)


FILES = ("config.json", "vocab.json", "merges.txt")
# What the published models were trained with; a folder's preprocessor_config.json goes before it.
MEAN, SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def load_clip_alignment(folder: Path | str) -> TextAlignment:
    """The mean over a clip's frames of CLIP's cosine with the prompt. Raises UserError for a folder that is no CLIP."""
    folder = Path(folder)
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise UserError(
            f"{folder}: expected a folder with CLIP as transformers keeps it (config.json, vocab.json, merges.txt, "
            f"weights), found no {', '.join(missing)}; save_pretrained of model and tokenizer writes one"
        )
    model, tokenizer = _load(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    mean, spread = _scaling(folder)
    side, words = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def read(frames: np.ndarray, prompt: str | None) -> Reading:
        if prompt is None:
            return Reading(None, NO_PROMPT)
        pixels = np.stack([_square(frame, side) for frame in frames]).astype(np.float32) / 255
        pixels = rearrange(torch.from_numpy((pixels - mean) / spread), "t h w c -> t c h w").to(device)
        tokens = tokenizer([prompt], truncation=True, max_length=words, return_tensors="pt").to(device)
        found = model(pixel_values=pixels, **tokens)
        return Reading(float((found.image_embeds @ found.text_embeds.T).mean()))

    measure = Measure(
        "text agreement",
        "mean over frames of the cosine between CLIP's vectors of the frame and of the prompt",
        "-1 to 1; for the published models about 0.3 is full agreement and 0.15 none: compare with the true clips'",
        "all motion, the order of things and how many there are; words beyond its limit are cut off",
        1,
        3,
    )
    return TextAlignment(measure, f"text agreement by CLIP in {folder}", read)


def _load(folder: Path) -> tuple[CLIPModel, CLIPTokenizer]:
    try:
        model, loaded = CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises whatever it comes upon first
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{folder}: expected a folder with CLIP as transformers keeps it, found one that cannot be loaded "
            f"({reason}); fetch it anew"
        ) from None
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"{folder}: expected all of CLIP's weights, found none for {len(missing)} of them, such as {missing[0]}; a "
            "text or image encoder alone is not enough"
        )
    return model, tokenizer


def _scaling(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread of the colours that the model expects."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return np.float32(MEAN), np.float32(SPREAD)
    try:
        given = parse_json(path.read_bytes())
        mean, spread = (np.array(given[key], np.float32).reshape(3) for key in ("image_mean", "image_std"))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: expected image_mean and image_std, three numbers each, found something else ({error!r}); fetch "
            "it anew"
        ) from None
    return mean, spread


def _square(frame: np.ndarray, side: int) -> np.ndarray:
    """The middle of a frame at the size that the model takes."""
    picture = Image.fromarray(frame)
    scale = side / min(picture.size)
    width, height = (max(side, round(length * scale)) for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture.crop((left, top, left + side, top + side)))
