"""What scripts/evaluate.py makes before it measures: the options for it, and the rows in their order.

For each checkpoint: its clips, those of its image part alone, and true clips through its autoencoder; for all of them
the same scenes of the drawn world, with their captions as prompts. Then the same clips at other frame rates.
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
    RowGenerator,
    SampledRows,
    Wanted,
    true_row,
)
from ldm.sampling.given_frames import MAX_FRAMES
from ldm.sampling.loop import SAMPLERS
from ldm.sampling.prompts import read_schedule
from ldm.sampling.settings import PRECISIONS

WORLD = Path("world")
CHECKPOINT_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
NUM_CLIPS, MOST_ALONE = 64, 32
MAX_SEED = 2**32
# Of `clip_requests.read_request`.
CLIP_OPTIONS = ("frames", "fps", "H", "W", "steps", "sampler", "scale", "motion_scale", "window")


def add_making_options(parser: argparse.ArgumentParser) -> None:
    """The options of clips that are made here; those that are not given are None."""
    making = parser.add_argument_group("clips made here, by checkpoints and the drawn world")
    making.add_argument("--clips", type=int, metavar="N", help=f"in a row (default: {NUM_CLIPS})")
    making.add_argument(
        "--looks", metavar="NAMES",
        help="of the drawn world: all, moving (those seen in motion in training), still, or names with commas between "
        "(default: all)",
    )  # fmt: skip
    making.add_argument("--prompts", type=Path, metavar="FILE", help="one a line, instead of the world's captions")
    making.add_argument("--seed", type=int, metavar="N", help="of the first clip; the next ones count on (default: 0)")
    making.add_argument("--fps", type=float, help="told to networks that ask (default: as in training)")
    making.add_argument("--H", type=int, metavar="PIXELS", help="height (default: as in training)")
    making.add_argument("--W", type=int, metavar="PIXELS", help="width (default: as in training)")
    making.add_argument("--steps", type=int, metavar="N", help="diffusion steps (default: as in txt2vid.py)")
    making.add_argument("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: as in txt2vid.py)")
    making.add_argument("--scale", type=float, help="guidance; 1 is none and twice as fast")
    making.add_argument("--motion-scale", type=float, metavar="SCALE", help="guidance away from frames by themselves")
    making.add_argument("--window", type=int, metavar="N", help="frames made at once (default: as in txt2vid.py)")
    making.add_argument(
        "--alone", type=int, metavar="N",
        help=f"clips of the {ALONE}, the network without its layers over time (default: as --clips, {MOST_ALONE} at "
        "most; 0: no such row)",
    )  # fmt: skip
    making.add_argument(
        "--rates", metavar="FPS,FPS,...",
        help=f"{FEWEST_RATES} frame rates or more: does the motion follow the rate that is asked for?",
    )  # fmt: skip
    making.add_argument(
        "--made", type=Path, metavar="DIR",
        help="folder for these clips; those that are there are not made again (default: clips in that of the report)",
    )  # fmt: skip
    making.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    making.add_argument("--precision", choices=PRECISIONS, help="default: bf16 on CUDA cards that have it, else full")


def split_given(given: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """What is named to be evaluated -> checkpoints, and videos or folders of them."""
    checkpoints = [path for path in given if _is_checkpoint(path)]
    return checkpoints, [path for path in given if path not in checkpoints]


def _is_checkpoint(path: Path) -> bool:
    if path.is_dir():
        return is_bundle(path) or (path / "model_index.json").is_file() or any(path.glob("*.safetensors"))
    return path.suffix.lower() in CHECKPOINT_SUFFIXES


class EvaluationPlan:
    """The rows to be made: `make` makes them, then `rows`, `true` and `at_rates` have them.

    options: of the command line: those of `add_making_options`, and `frames`, `out` and `reference`.
    like: the format of videos that are evaluated too, None where there are none. words: the command line.

    Raises UserError for what cannot be made, before anything is.
    """

    def __init__(
        self, options: argparse.Namespace, checkpoints: Sequence[Path], like: ClipFormat | None, words: str
    ) -> None:
        check_use(options, checkpoints)
        num, self.seed = NUM_CLIPS if options.clips is None else options.clips, options.seed or 0
        self.folder = options.made or options.out / "clips"
        self.rates = [] if options.rates is None else read_rates(options.rates)
        self.has_world = WORLD in options.reference
        self.prompts = None if options.prompts is None else read_prompts(options.prompts)
        self.scenes = unseen_scenes(choose_looks("all" if options.looks is None else options.looks), num, self.seed)
        self.num_alone = min(num, MOST_ALONE) if options.alone is None else options.alone
        self.makers = self._open(options, checkpoints, words)
        self.form = self._common_format(like)
        self.rows: list[MadeRow] = []
        self.true: MadeRow | None = None
        self.at_rates: dict[str, dict[float, MadeRow]] = {}

    @property
    def num_clips(self) -> int:
        """All clips that there will be."""
        num = len(self.scenes)
        each = sum(num + self._num_alone(maker) for maker in self.makers) + self.needs_true * num
        each += self.has_world * num * len(self._autoencoders())
        return each + len(self.rates) * num * (len(self.makers) + self.has_world)

    @property
    def clip_format(self) -> ClipFormat:
        """The clips' format, as they are read."""
        frames, size, fps = self.form
        return ClipFormat(frames, *_reading_size(*size), Fraction(fps).limit_denominator(1001))

    @property
    def needs_true(self) -> bool:
        """Whether scenes are drawn: to be held beside, or for their captions."""
        return self.has_world or (bool(self.makers) and self.prompts is None)

    def make(self, advance: Advance) -> None:
        """Make all rows; `advance` is called with the number of clips that are done."""
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

    def _open(self, options: argparse.Namespace, checkpoints: Sequence[Path], words: str) -> list[SampledRows]:
        if not checkpoints:
            return []
        clip = {name: getattr(options, name) for name in CLIP_OPTIONS if getattr(options, name) is not None}
        device = choose_device(options.device or "auto")
        precision = choose_precision(options.precision, device)
        makers = []
        for path, name in zip(checkpoints, row_names(checkpoints), strict=True):
            generator = RowGenerator(path, device=device, precision=precision)
            makers.append(SampledRows(generator, name, clip, self.folder, words))
            if self.rates and not generator.is_told_fps:
                raise UserError(
                    f"--rates: expected a network that is told the frame rate (fps_embedding), found {path}, which is "
                    "not; leave out --rates or this checkpoint"
                )
            for rate in self.rates:
                makers[-1].settings_at(rate)
        return makers

    def _common_format(self, like: ClipFormat | None) -> tuple[int, tuple[int, int], float]:
        """Frames, size (h, w) and rate of all clips, those of videos that are evaluated too; raises UserError."""
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
                    f"{name}: expected {_words(*wanted)} as {first}, found {_words(*form)}; make them alike with "
                    "--frames, --H, --W and --fps"
                )
        if self.makers:
            return wanted[0], (self.makers[0].settings.height, self.makers[0].settings.width), wanted[2]
        if any(side % 2 for side in wanted[1]):
            raise UserError(
                f"--reference {WORLD}: expected clips with even sides, as those of the drawn world have on disk, found "
                f"{_words(*wanted)}; give other footage"
            )
        return wanted

    def _num_alone(self, maker: SampledRows) -> int:
        return self.num_alone if maker.generator.training.has_time else 0

    def _autoencoders(self) -> dict[str, SampledRows]:
        """The name of each autoencoder's row -> a checkpoint that has it."""
        found: dict[str, SampledRows] = {}
        for maker in self.makers:
            found.setdefault(maker.generator.identity_of_autoencoder(), maker)
        several = len(found) > 1
        return {f"{AUTOENCODED}, {maker.name}" if several else AUTOENCODED: maker for maker in found.values()}

    def _wanted(self, prompts: Sequence[str]) -> Iterator[Wanted]:
        for number in range(len(self.scenes)):
            yield Wanted(number, self.seed + number, prompts[number % len(prompts)])


def planned_of(row: MadeRow) -> tuple[PlannedRow, ClipFormat]:
    """A row that was made, to be read, and the format of its clips."""
    _, form = plan_rows(row.files[:2], None)
    return PlannedRow(row.name, tuple(VideoCuts(path, (0,), read_prompt(path)) for path in row.files)), form


def row_names(checkpoints: Sequence[Path]) -> list[str]:
    """A name for each: that of its run, or of the file; the whole path where two have the same."""
    names = []
    for path in checkpoints:
        place = path.resolve()
        names.append(place.parents[1].name if place.parent.name == "checkpoints" else place.stem)
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, checkpoints, strict=True)]


def read_rates(text: str) -> list[float]:
    """The frame rates that `--rates` names; raises UserError."""
    try:
        rates = sorted({float(word) for word in text.split(",")})
    except ValueError:
        rates = []
    if len(rates) < FEWEST_RATES or not all(0 < rate <= 240 for rate in rates):
        raise UserError(
            f"--rates: expected {FEWEST_RATES} different frame rates or more, such as 4,6,12, found {text!r}"
        )
    return rates


def read_prompts(path: Path) -> list[str]:
    """The prompts in a text file, one a line, empty lines and those that begin with # left out; raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: expected a text file with one prompt a line, found no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected a text file in UTF-8, found other bytes ({error.reason})") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise UserError(f"{path}: expected one prompt a line, found none")
    for prompt in prompts:
        if read_schedule(prompt, MAX_FRAMES) is not None:
            raise UserError(f"{path}: expected plain prompts, found one that changes along the clip, {prompt!r}")
    return prompts


def check_use(options: argparse.Namespace, checkpoints: Sequence[Path]) -> None:
    """Raise UserError for an option that nothing would read, and for numbers out of range."""
    has_world = WORLD in options.reference
    for names, has_use, what in (
        ((*CLIP_OPTIONS[1:], "prompts", "alone", "rates", "device", "precision"),
         bool(checkpoints), "a checkpoint to make clips"),
        (("clips", "looks", "seed", "made"), bool(checkpoints) or has_world, f"a checkpoint, or --reference {WORLD}"),
    ):  # fmt: skip
        given = [name for name in names if getattr(options, name) is not None]
        if given and not has_use:
            raise UserError(f"--{given[0]}: expected {what}, found none")
    if has_world and len(options.reference) > 1:
        raise UserError(f"--reference: expected footage or {WORLD}, found both; choose one")
    num = NUM_CLIPS if options.clips is None else options.clips
    if num < 2:
        raise UserError(f"--clips: expected at least 2, found {num}; a mean and its interval need more, 30 or so")
    if options.alone is not None and (options.alone == 1 or not 0 <= options.alone <= num):
        raise UserError(f"--alone: expected 0, or 2 to the {num} of --clips, found {options.alone}")
    if options.seed is not None and not 0 <= options.seed <= MAX_SEED:
        raise UserError(f"--seed: expected a whole number from 0 to {MAX_SEED:,}, found {options.seed}")


def _reading_size(height: int, width: int) -> tuple[int, int]:
    return working_size(height, width) if max(height, width) > WORKING_SIDE else (height, width)


def _words(frames: int, size: tuple[int, int], fps: float) -> str:
    return f"{frames} frames of {size[1]}x{size[0]}, {fps:.4g} a second"
