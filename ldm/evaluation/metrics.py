"""The metrics of an evaluation: measures of motion, text alignment, and the features of Frechet distances.

Which of them apply depends on the files at hand and on the clips; `MetricSet.descriptions` lists what was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldm.errors import UserError
from ldm.evaluation.features import MOTION_ON_A_GRID, NUM_FRAMES, Extractor, load_i3d, style_extractors
from ldm.evaluation.flow import Motion, measure_motion
from ldm.evaluation.look_judge import load_style_classifier
from ldm.evaluation.motion import MEASURES, NO_TEXTURE, Measure, Reading, has_texture, read_measures
from ldm.evaluation.text_alignment import TextAlignment, load_clip_alignment, style_alignment

TEXT_ALIGNMENT = "text_agreement"  # as in the JSON of earlier evaluations
BUNDLED_CLASSIFIER = Path(__file__).parents[2] / "models" / "drive" / "judge.safetensors"


@dataclass(frozen=True)
class ClipMetrics:
    """One clip: its reading of each measure, its features by each extractor (None without texture), its motion."""

    readings: dict[str, Reading]
    features: dict[str, np.ndarray | None]
    motion: Motion


@dataclass(frozen=True)
class MetricSet:
    """The measures of a clip and the extractors of its features; by default measures of motion alone."""

    text_alignment: TextAlignment | None = None
    extractors: Mapping[str, Extractor] = field(default_factory=dict)
    descriptions: Sequence[str] = ()

    @property
    def measures(self) -> dict[str, Measure]:
        """All measures by name, in the order of a report."""
        return {**MEASURES, **({TEXT_ALIGNMENT: self.text_alignment.measure} if self.text_alignment else {})}

    def measure(self, frames: np.ndarray, prompt: str | None) -> ClipMetrics:
        """Measure one clip, uint8 RGB `t h w 3`; prompt: None where none is known."""
        motion = measure_motion(frames)
        readings = dict(read_measures(motion))
        is_measurable = has_texture(motion)
        if self.text_alignment:
            read = self.text_alignment.read
            readings[TEXT_ALIGNMENT] = read(frames, prompt) if is_measurable else Reading(None, NO_TEXTURE)
        features = {
            name: extractor.extract(frames, motion) if is_measurable else None
            for name, extractor in self.extractors.items()
        }
        return ClipMetrics(readings, features, motion)


@dataclass(frozen=True)
class MetricNeeds:
    """What decides which metrics apply: frames of a clip, and whether true clips and prompts are known."""

    num_frames: int
    has_true_clips: bool
    has_prompts: bool


def choose_metrics(classifier: Path | None, clip: Path | None, i3d: Path | None, needs: MetricNeeds) -> MetricSet:
    """Load the metrics that apply.

    classifier: a style classifier; None: the bundled one, which may be missing. clip: folder of a CLIP model, replaces
    the classifier for text alignment. i3d: TorchScript file, for FVD. Raises UserError for files that cannot be read
    and for files that the evaluation cannot use.
    """
    _check_use(clip, i3d, needs)
    descriptions, alignment, extractors = [], None, {}
    path = classifier or BUNDLED_CLASSIFIER
    styles = load_style_classifier(path) if classifier or path.is_file() else None
    if styles is None:
        descriptions.append(f"no style classifier ({path.name}): no text alignment and no Frechet distances by it")
    if needs.has_prompts and clip is not None:
        alignment = load_clip_alignment(clip)
    elif needs.has_prompts and styles is not None:
        alignment = style_alignment(styles)
    if alignment is not None:
        descriptions.append(alignment.description)
    elif not needs.has_prompts:
        descriptions.append("no text alignment: no clip has a prompt, neither in its file nor in a text file beside it")
    if needs.has_true_clips:
        extractors = {**(style_extractors(styles) if styles else {}), "frechet_motion": MOTION_ON_A_GRID}
        if i3d is not None:
            extractors["fvd"] = load_i3d(i3d)
        descriptions += [f"Frechet distance of {its.title} by {its.name}" for its in extractors.values()]
    else:
        descriptions.append("no Frechet distances: they need true clips; give them with --reference")
    return MetricSet(alignment, extractors, descriptions)


def _check_use(clip: Path | None, i3d: Path | None, needs: MetricNeeds) -> None:
    if clip is not None and not needs.has_prompts:
        raise UserError(
            "--clip-model: expected clips with prompts, found none; prompts are in the files that txt2vid.py writes, "
            "or in a text file of the same name beside a video"
        )
    if i3d is None:
        return
    if not needs.has_true_clips:
        raise UserError("--i3d: expected true clips, found none; give them with --reference")
    if needs.num_frames < NUM_FRAMES:
        raise UserError(
            f"--i3d: expected clips of at least {NUM_FRAMES} frames, found {needs.num_frames}; make longer clips, or "
            "leave out --i3d"
        )
