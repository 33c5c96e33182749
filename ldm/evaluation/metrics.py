"""Everything that looks at a clip beside the measures of motion: text agreement and what Frechet distances are between.

Which of it there is depends on the files at hand; `MetricSet.told` says in words what was used and what was not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldm.errors import UserError
from ldm.evaluation.features import MOTION_ON_A_GRID, NUM_FRAMES, Extractor, load_i3d, own_extractors
from ldm.evaluation.flow import Motion, measure_motion
from ldm.evaluation.look_judge import load_style_classifier
from ldm.evaluation.motion import MEASURES, NO_TEXTURE, Measure, Reading, has_texture, read_measures
from ldm.evaluation.text_alignment import TextAlignment, style_alignment

TEXT_ALIGNMENT = "text_agreement"
BUNDLED_CLASSIFIER = Path(__file__).parents[2] / "models" / "drive" / "judge.safetensors"


@dataclass(frozen=True)
class ClipMetrics:
    """What was found in one clip: a reading of each measure, and features by each extractor, None of an empty picture.

    motion: at the working size.
    """

    readings: dict[str, Reading]
    features: dict[str, np.ndarray | None]
    motion: Motion


@dataclass(frozen=True)
class MetricSet:
    """The measures of a clip and the extractors of its features; the motion alone when nothing else is given."""

    agreement: TextAlignment | None = None
    extractors: Mapping[str, Extractor] = field(default_factory=dict)
    told: Sequence[str] = ()

    @property
    def measures(self) -> dict[str, Measure]:
        """All measures by name, in the order of a report."""
        return {**MEASURES, **({TEXT_ALIGNMENT: self.agreement.measure} if self.agreement else {})}

    def measure(self, frames: np.ndarray, prompt: str | None) -> ClipMetrics:
        """Read one clip, uint8 RGB `t h w 3`, and its prompt, None where none is known."""
        motion = measure_motion(frames)
        readings = dict(read_measures(motion))
        if not has_texture(motion):
            if self.agreement:
                readings[TEXT_ALIGNMENT] = Reading(None, NO_TEXTURE)
            return ClipMetrics(readings, dict.fromkeys(self.extractors), motion)
        if self.agreement:
            readings[TEXT_ALIGNMENT] = self.agreement.read(frames, prompt)
        features = {name: extractor.extract(frames, motion) for name, extractor in self.extractors.items()}
        return ClipMetrics(readings, features, motion)


@dataclass(frozen=True)
class MetricNeeds:
    """What of the metrics an evaluation can use: its clips' frames, and whether it knows true clips and prompts."""

    num_frames: int
    has_true_clips: bool
    has_prompts: bool


def choose_metrics(judge: Path | None, clip: Path | None, i3d: Path | None, needs: MetricNeeds) -> MetricSet:
    """Load what is named; `judge` None is the bundled one, which may be missing.

    `clip` is a folder of CLIP and takes the judge's place for text agreement, `i3d` a file for FVD. Raises UserError
    for files that cannot be used, and for those that the evaluation has no use for.
    """
    _check_use(clip, i3d, needs)
    told, agreement, extractors = [], None, {}
    found = load_style_classifier(judge or BUNDLED_CLASSIFIER) if judge or BUNDLED_CLASSIFIER.is_file() else None
    if found is None:
        told.append(
            f"{BUNDLED_CLASSIFIER.name} is not there: no text agreement by it and no Frechet distances of what it sees"
        )
    if needs.has_prompts and clip is not None:
        from ldm.evaluation.text_alignment import load_clip_alignment  # noqa: PLC0415 - transformers takes seconds to load

        agreement = load_clip_alignment(clip)
    elif needs.has_prompts and found is not None:
        agreement = style_alignment(found)
    if agreement is not None:
        told.append(agreement.told)
    elif not needs.has_prompts:
        told.append("no text agreement: none of the clips has a prompt, in its file or in a text file beside it")
    if needs.has_true_clips:
        extractors = {**(own_extractors(found) if found else {}), "frechet_motion": MOTION_ON_A_GRID}
        if i3d is not None:
            extractors["fvd"] = load_i3d(i3d)
        told += [f"Frechet distance of {its.title} by {its.name}" for its in extractors.values()]
    else:
        told.append("no Frechet distances: they are taken from true clips, which --reference gives")
    return MetricSet(agreement, extractors, told)


def _check_use(clip: Path | None, i3d: Path | None, needs: MetricNeeds) -> None:
    if clip is not None and not needs.has_prompts:
        raise UserError(
            "--clip-model: expected clips with prompts, found none; prompts are in the files that txt2vid.py writes, "
            "or in a text file of the same name beside a video"
        )
    if i3d is None:
        return
    if not needs.has_true_clips:
        raise UserError("--i3d: expected true clips to be distant from, found none; give them with --reference")
    if needs.num_frames < NUM_FRAMES:
        raise UserError(
            f"--i3d: expected clips of at least {NUM_FRAMES} frames, found {needs.num_frames}; make longer ones, or "
            "leave --i3d out"
        )
