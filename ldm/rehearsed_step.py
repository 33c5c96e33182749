"""One training step at full size on made-up clips: what it reads, and the row of a report that says what it took."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from ldm.atomic import write_atomically
from ldm.checkpoint import identity
from ldm.checkpoint_encoders import encoder_tensors, latent_scale
from ldm.checkpoint_names import FIRST_STAGE_PREFIX, TEXT_PREFIX
from ldm.config import to_container
from ldm.data.preparation import Preparation, Settings
from ldm.measuring import Measured
from ldm.planning.training_step import PROCESSOR, count_step, pixels_per_latent, shape_of

TITLE = "## A step of each preset"
HEADER = [
    TITLE, "",
    "`python scripts/rehearse.py --step-only --base configs/video-sd.yaml PRESET`: one training step at full size on "
    "made-up latents, in a process of its own that starts from the image checkpoint and writes its own at the end. "
    "Resident is the kernel's own count of the whole process, GiB: Python and its libraries, and the pages of mapped "
    "checkpoints; what is freed of blocks from 1 MiB on goes back to the system at once. Counted is the step's live "
    "tensors alone, on a processor and on a card, as `scripts/plan.py` has it before any step. Seconds "
    "are with one thread and whatever else the machine did; a dash is what was not seen.", "",
    "| config | clips x frames | loss | resident | without mapped files | counted: processor | card | s | when |",
    "|---|---|---|---|---|---|---|---|---|",
]  # fmt: skip
# The C library's word (Linux) for: what is freed of blocks from 1 MiB on goes back to the system, and is not resident.
GIVE_BACK = ("MALLOC_MMAP_THRESHOLD_", str(2**20))
NUM_TOKENS = 77
GIB = 2**30


@dataclass(frozen=True)
class StepTaken:
    """A step that was measured, beside what was counted; bytes."""

    name: str
    size: str
    loss: float
    measured: Measured
    on_processor: int
    on_card: int

    def row(self) -> str:
        """A row of the report's table."""
        sizes = (self.measured.peak_memory, self.measured.peak_own_memory, self.on_processor, self.on_card)
        cells = ["-" if size is None else f"{size / GIB:.2f}" for size in sizes]
        cells = [self.name, self.size, f"{self.loss:.4f}", *cells, f"{self.measured.seconds:.0f}"]
        return f"| {' | '.join([*cells, date.today().isoformat()])} |"


def name_of(bases: Sequence[str], overrides: Sequence[str]) -> str:
    """The last config and the words that change it, as a cell of the table."""
    return " ".join([Path(bases[-1]).stem, *(f"`{word}`" for word in overrides)])


def write_made_up_clips(folder: Path, config: DictConfig | Mapping[str, Any], image_file: Path) -> None:
    """A prepared folder for one step of a config, as if by the encoders in `image_file`; normal numbers for latents."""
    config = to_container(config)
    config["model"]["params"]["ckpt_path"] = str(image_file)
    shape, data = shape_of(config), config["data"]["params"]
    tensors = encoder_tensors(config)
    names = {
        prefix: identity({name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)})
        for prefix in (FIRST_STAGE_PREFIX, TEXT_PREFIX)
    }
    unet, pixels = config["model"]["params"]["unet_config"]["params"], pixels_per_latent(config)
    settings = Settings(
        first_stage=names[FIRST_STAGE_PREFIX],
        text_encoder=names[TEXT_PREFIX],
        scale_factor=latent_scale(config),
        fps=float((config.get("prepare") or {}).get("fps", 10)),
        size=[shape.height * pixels, shape.width * pixels],
        num_tokens=NUM_TOKENS,
    )
    making, random = Preparation(folder, settings), np.random.default_rng(0)

    def normal(*size: int) -> np.ndarray:
        return random.standard_normal(size, dtype=np.float32).astype(np.float16)

    making.store_empty_context(normal(NUM_TOKENS, unet["context_dim"]))
    length = (shape.frames - 1) * min(data.get("strides") or [1]) + 1
    for number in range(shape.clips):
        with making.video(f"made-up-{number}", f"{number:064x}", ["a road"]) as part:
            moments = normal(length, 2 * unet["out_channels"], shape.height, shape.width)
            part.add(range(length), moments, [normal(NUM_TOKENS, unet["context_dim"])])
    making.finish()


def step_taken(name: str, config: DictConfig | Mapping[str, Any], measured: Measured) -> StepTaken:
    """What a run of one step took and printed, beside what is counted for it here."""
    found = re.findall(r"\bloss (-?[\w.]+)", measured.output)
    config = to_container(config)
    shape = shape_of(config)
    counts = [count_step(config, shape, *machine).peak.total for machine in ((PROCESSOR,), ())]
    size = f"{shape.clips} x {shape.frames}"
    return StepTaken(name, size, float(found[-1]) if found else math.nan, measured, *counts)


def mistakes(step: StepTaken, most: float | None) -> list[str]:
    """What is not as it should be. most: GB that may be resident; None: any."""
    found = [] if math.isfinite(step.loss) else [f"the loss is {step.loss}, no finite number"]
    if most is not None and step.measured.peak_memory > most * 1e9:
        found.append(f"{step.measured.peak_memory / 1e9:.2f} GB were resident, more than {most:g}")
    return found


def with_row(report: str, step: StepTaken) -> str:
    """The text of a report with the step's row in its table, in place of an older one of the same name and size."""
    before, section = split_off(report)
    start = f"| {step.name} | {step.size} |"
    rows = [line for line in section.splitlines()[len(HEADER) :] if line and not line.startswith(start)]
    return "\n".join([before.rstrip("\n"), "", *HEADER, *rows, step.row(), ""]).lstrip("\n")


def write_row(path: Path, step: StepTaken) -> None:
    """Put the step's row into a report that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, with_row(path.read_text(encoding="utf-8") if path.is_file() else "", step))


def with_rows_of(path: Path, report: str) -> str:
    """The text of a new report with the table of steps of the one in a file, if there is one."""
    section = split_off(path.read_text(encoding="utf-8"))[1] if path.is_file() else ""
    return f"{report}\n{section}" if section else report


def split_off(report: str) -> tuple[str, str]:
    """A report without the table of steps, and that table, which is at its end."""
    before, title, after = report.partition(TITLE)
    return before, title + after

