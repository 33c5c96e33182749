"""The plan of scripts/evaluate.py: options for clips that are sampled first, and the rows in their order.

Per checkpoint: its clips, those of its image part, and true clips through its autoencoder; all of the same scenes of
the procedural world, with their captions as prompts. Then the same clips at other frame rates.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from ldm.checkpoint.layouts import is_bundle
from ldm.data.world import choose_looks, unseen_scenes
from ldm.devices import choose_device, choose_precision
from ldm.errors import UserError
from ldm.evaluation.clip_files import ClipFormat, PlannedRow, VideoCuts, plan_rows, read_prompt
from ldm.evaluation.commanded_rate import FEWEST_RATES
from ldm.evaluation.flow import WORKING_SIDE, working_size
from ldm.experiments.sampled_rows import (
    ALONE,
    AUTOENCODED,
    TRUE,
    Advance,
    MadeRow,
    SampledRows,
    WantedClip,
    autoencoder_identity,
    true_row,
)
from ldm.sampling.generator import ClipGenerator
from ldm.sampling.options import add_options
from ldm.sampling.prompts import read_prompt_lines, read_schedule
from ldm.sampling.request import flag
from ldm.sampling.settings import MAX_FRAMES

WORLD = Path("world")
CHECKPOINT_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
NUM_CLIPS, MAX_ALONE = 64, 32
MAX_SEED = 2**32
CLIP_OPTIONS = ("frames", "fps", "H", "W", "steps", "sampler", "scale", "motion_scale", "window")  # of `read_request`


def add_making_options(parser: argparse.ArgumentParser) -> None:
    """The options of clips that are sampled first; None when not given."""
    making = parser.add_argument_group(
        "clips of checkpoints and of the procedural world (* or as the checkpoint suggests)"
    )
    making.add_argument("--clips", type=int, metavar="N", help=f"per row (default: {NUM_CLIPS})")
    making.add_argument(
        "--looks", metavar="NAMES",
        help="styles of the procedural world: all, moving (seen in motion in training), still, or names separated by "
        "commas (default: all)",
    )  # fmt: skip
    making.add_argument("--prompts", type=Path, metavar="FILE", help="one a line, instead of the world's captions")
    making.add_argument("--seed", type=int, metavar="N", help="of the first clip; later clips count up (default: 0)")
    add_options(making, "--fps", "--H", "--W", "--steps", "--sampler", "--scale", "--motion-scale", "--window")
    making.add_argument(
        "--alone", type=int, metavar="N",
        help=f"clips of the {ALONE}, the network without temporal layers (default: as --clips, at most {MAX_ALONE}; 0: "
        "no such row)",
    )  # fmt: skip
    making.add_argument(
        "--rates", metavar="FPS,FPS,...",
        help=f"{FEWEST_RATES} or more frame rates: does the motion follow the requested rate?",
    )  # fmt: skip
    making.add_argument(
        "--made", type=Path, metavar="DIR",
        help="folder of these clips; existing ones are kept (default: clips in the folder of the report)",
    )  # fmt: skip
    add_options(making, "--device", "--precision")


def split_given(given: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Paths to evaluate -> checkpoints, and videos or folders of them."""
    checkpoints = [path for path in given if _is_checkpoint(path)]
    return checkpoints, [path for path in given if path not in checkpoints]


def _is_checkpoint(path: Path) -> bool:
    if path.is_dir():
        return is_bundle(path) or (path / "model_index.json").is_file() or any(path.glob("*.safetensors"))
    return path.suffix.lower() in CHECKPOINT_SUFFIXES


class EvaluationPlan:
    """Rows to make; after `make` they are in `rows`, `true` and `at_rates`.

    options: of the command line: those of `add_making_options`, and `frames`, `out` and `reference`.
    like: the format of videos that are evaluated too, None without any. command: the command line, for the records.

    Raises UserError for impossible rows, before any is made.
    """

    def __init__(
        self, options: argparse.Namespace, checkpoints: Sequence[Path], like: ClipFormat | None, command: str
    ) -> None:
        check_use(options, checkpoints)
        num, self.seed = NUM_CLIPS if options.clips is None else options.clips, options.seed or 0
        self.folder = options.made or options.out / "clips"
        self.rates = [] if options.rates is None else read_rates(options.rates)
        self.has_world = WORLD in options.reference
        self.prompts = None if options.prompts is None else read_prompts(options.prompts)
        self.scenes = unseen_scenes(choose_looks("all" if options.looks is None else options.looks), num, self.seed)
        self.num_alone = min(num, MAX_ALONE) if options.alone is None else options.alone
        self.makers = self._open(options, checkpoints, command)
        self.form = self._common_format(like)
        self.rows: list[MadeRow] = []
        self.true: MadeRow | None = None
        self.at_rates: dict[str, dict[float, MadeRow]] = {}

    @property
    def num_clips(self) -> int:
        """The number of clips of all rows."""
        num = len(self.scenes)
        each = sum(num + self._num_alone(maker) for maker in self.makers) + self.needs_true * num
        each += self.has_world * num * len(self._autoencoders())
        return each + len(self.rates) * num * (len(self.makers) + self.has_world)

    @property
    def clip_format(self) -> ClipFormat:
        """The format in which the clips are read."""
        frames, size, fps = self.form
        return ClipFormat(frames, *_reading_size(*size), Fraction(fps).limit_denominator(1001))

    @property
    def needs_true(self) -> bool:
        """Whether scenes are rendered: as a reference, or for their captions."""
        return self.has_world or (bool(self.makers) and self.prompts is None)

    def make(self, advance: Advance) -> None:
        """Make all rows; `advance` is called with the number of clips done."""
        frames, size, fps = self.form
        captions: list[str] = []
        if self.needs_true:
            true = true_row(self.scenes, frames, size, fps, self.folder, advance)
            captions = [read_prompt(path) or "" for path in true.files]
            self.true = true if self.has_world else None
        if self.true is not None:
            self.rows += [maker.autoencoded(self.true, advance, name) for name, maker in self._autoencoders().items()]
        wanted = list(self._wanted(self.prompts or captions)) if self.makers else []
        several = len(self.makers) > 1
        for maker in self.makers:
            if num := self._num_alone(maker):
                name = f"{ALONE}, {maker.name}" if several else ALONE
                self.rows.append(maker.alone(wanted[:num], advance, name))
        self.rows += [maker.sampled(wanted, advance) for maker in self.makers]
        for maker in self.makers:
            if self.rates:
                self.at_rates[maker.name] = {rate: maker.sampled(wanted, advance, rate) for rate in self.rates}
        if self.has_world and self.rates:
            self.at_rates[TRUE] = {
                rate: true_row(self.scenes, frames, size, rate, self.folder, advance) for rate in self.rates
            }

    def _open(self, options: argparse.Namespace, checkpoints: Sequence[Path], command: str) -> list[SampledRows]:
        if not checkpoints:
            return []
        clip = {name: getattr(options, name) for name in CLIP_OPTIONS if getattr(options, name) is not None}
        device = choose_device(options.device or "auto")
        precision = choose_precision(options.precision, device)
        makers = []
        for path, name in zip(checkpoints, row_names(checkpoints), strict=True):
            generator = ClipGenerator(path, device=device, precision=precision)
            makers.append(SampledRows(generator, name, clip, self.folder, command))
            if self.rates and not generator.has_fps_embedding:
                raise UserError(
                    f"--rates: expected a network conditioned on the frame rate (fps_embedding), found {path} without; "
                    "leave out --rates or this checkpoint"
                )
            for rate in self.rates:
                makers[-1].settings_at(rate)
        return makers

    def _common_format(self, like: ClipFormat | None) -> tuple[int, tuple[int, int], float]:
        """Frames, size (h, w) and rate of all clips, including evaluated videos; raises UserError."""
        found = [
            (maker.name, (its.frames, _reading_size(its.height, its.width), its.fps))
            for maker in self.makers
            for its in [maker.settings]
        ]
        if like is not None:
            found.insert(0, ("the videos", (like.num_frames, (like.height, like.width), float(like.rate))))
        first, wanted = found[0]
        for name, form in found[1:]:
            if form[:2] != wanted[:2] or abs(form[2] / wanted[2] - 1) > 0.001:
                raise UserError(
                    f"{name}: expected {_describe(*wanted)} like {first}, found {_describe(*form)}; set --frames, --H, "
                    "--W and --fps"
                )
        if self.makers:
            return wanted[0], (self.makers[0].settings.height, self.makers[0].settings.width), wanted[2]
        if any(side % 2 for side in wanted[1]):
            raise UserError(
                f"--reference {WORLD}: expected clips with even sides, found {_describe(*wanted)}; give other footage"
            )
        return wanted

    def _num_alone(self, maker: SampledRows) -> int:
        return self.num_alone if maker.generator.training.has_time else 0

    def _autoencoders(self) -> dict[str, SampledRows]:
        """The name of each autoencoder's row -> a checkpoint with that autoencoder."""
        found: dict[str, SampledRows] = {}
        for maker in self.makers:
            found.setdefault(autoencoder_identity(maker.generator), maker)
        several = len(found) > 1
        return {f"{AUTOENCODED}, {maker.name}" if several else AUTOENCODED: maker for maker in found.values()}

    def _wanted(self, prompts: Sequence[str]) -> Iterator[WantedClip]:
        for number in range(len(self.scenes)):
            yield WantedClip(number, self.seed + number, prompts[number % len(prompts)])


def planned_of(row: MadeRow) -> tuple[PlannedRow, ClipFormat]:
    """A finished row as one to read, and the format of its clips."""
    _, form = plan_rows(row.files[:2], None)
    return PlannedRow(row.name, tuple(VideoCuts(path, (0,), read_prompt(path)) for path in row.files)), form


def row_names(checkpoints: Sequence[Path]) -> list[str]:
    """The name of each checkpoint's run or file; the whole path if two are equal."""
    names = []
    for path in checkpoints:
        whole = path.resolve()
        names.append(whole.parents[1].name if whole.parent.name == "checkpoints" else whole.stem)
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, checkpoints, strict=True)]


def read_rates(text: str) -> list[float]:
    """Parse `--rates`; raises UserError."""
    try:
        rates = sorted({float(rate) for rate in text.split(",")})
    except ValueError:
        rates = []
    if len(rates) < FEWEST_RATES or not all(0 < rate <= 240 for rate in rates):
        raise UserError(
            f"--rates: expected {FEWEST_RATES} or more different frame rates such as 4,6,12, found {text!r}"
        )
    return rates


def read_prompts(path: Path) -> list[str]:
    """The plain prompts in a file, one a line; raises UserError."""
    prompts = [line for _, line in read_prompt_lines(path)]
    for prompt in prompts:
        if read_schedule(prompt, MAX_FRAMES) is not None:
            raise UserError(f"{path}: expected plain prompts, found a prompt schedule, {prompt!r}")
    return prompts


def check_use(options: argparse.Namespace, checkpoints: Sequence[Path]) -> None:
    """Raise UserError for an option without effect, and for numbers out of range."""
    has_world = WORLD in options.reference
    for names, has_use, what in (
        ((*CLIP_OPTIONS[1:], "prompts", "alone", "rates", "device", "precision"),
         bool(checkpoints), "a checkpoint to sample from"),
        (("clips", "looks", "seed", "made"), bool(checkpoints) or has_world, f"a checkpoint, or --reference {WORLD}"),
    ):  # fmt: skip
        given = [name for name in names if getattr(options, name) is not None]
        if given and not has_use:
            raise UserError(f"{flag(given[0])}: expected {what}, found none")
    if has_world and len(options.reference) > 1:
        raise UserError(f"--reference: expected footage or {WORLD}, found both; choose one")
    num = NUM_CLIPS if options.clips is None else options.clips
    if num < 2:
        raise UserError(f"--clips: expected at least 2, found {num}; use 30 or more for a useful mean and interval")
    if options.alone is not None and (options.alone == 1 or not 0 <= options.alone <= num):
        raise UserError(f"--alone: expected 0, or 2 to the {num} of --clips, found {options.alone}")
    if options.seed is not None and not 0 <= options.seed <= MAX_SEED:
        raise UserError(f"--seed: expected a whole number from 0 to {MAX_SEED:,}, found {options.seed}")


def _reading_size(height: int, width: int) -> tuple[int, int]:
    return working_size(height, width) if max(height, width) > WORKING_SIDE else (height, width)


def _describe(frames: int, size: tuple[int, int], fps: float) -> str:
    return f"{frames} frames of {size[1]}x{size[0]}, {fps:.4g} a second"
