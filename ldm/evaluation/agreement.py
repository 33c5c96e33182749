"""Whether a clip shows what its prompt says, by our own judge of looks: the share of its frames that have the look.

Only for prompts that name one look of the drawn world; other words - the road's shape, the speed - are not asked for.
CLIP judges any prompt (`agreement_clip.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ldm.data.world_captions import look_of_prompt
from ldm.evaluation.extractors import LooksAtFrames
from ldm.evaluation.motion import Measure, Reading

NO_PROMPT = "no prompt is known: neither the video nor a text file of its name beside it holds one"


@dataclass(frozen=True)
class Agreement:
    """Reads a clip, uint8 RGB `t h w 3`, against its prompt; None where no prompt is known. `told` says what judges."""

    measure: Measure
    told: str
    read: Callable[[np.ndarray, str | None], Reading]


def agreement_by(judge: LooksAtFrames) -> Agreement:
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
    return Agreement(measure, told, read)
