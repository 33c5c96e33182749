"""Turn footage into prepared clips: scenes, autoencoder moments and caption embeddings, stored for training.

    python scripts/prepare.py VIDEO_OR_FOLDER... --out DIR --config CFG --prompt "a drive" [--preview] [key=value ...]
    python scripts/prepare.py --world 500 --out DIR --config CFG [--frames 17] [--looks "desert,snow"] [key=value ...]

Run the same command again to resume after an interruption or to add videos: finished videos are skipped. With --world
the clips come from the procedural world, with captions; --frames 1 makes single images.

Several machines: --engine ray uses the workers of a Ray cluster; --shard 3/16 prepares every 16th video, and the same
command without --shard assembles the shares. All ways produce the same bytes.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress

from ldm import checkpoint
from ldm.config import check, load_config, to_container
from ldm.config.schema import FLAG, is_trusted, trusting
from ldm.data.preparing.footage import FootageError, name_videos
from ldm.data.preparing.parts import EncodingSettings
from ldm.data.preparing.preparation import SHARD_BYTES, Preparation
from ldm.data.preparing.report import make_progress, print_looks, print_table, summary, write_preview
from ldm.data.preparing.sources import (
    Encoders,
    PreparePlan,
    Source,
    VideoSource,
    find_captions,
    identities,
    plan_videos,
    prepare_source,
)
from ldm.data.preparing.upload import check_writable, num_bytes, upload
from ldm.data.shards.address import Address, place_of
from ldm.data.world import choose_looks
from ldm.data.world.sources import draw_ahead, plan_world, usable_cores
from ldm.errors import Parser, UserError, run_command
from ldm.video import parse_size

DEFAULT_FPS, DEFAULT_SIZE, DEFAULT_FRAMES = 10.0, 512, 17  # 17: five frames, every fourth
SIZE_STEP = 64


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `key=value` among the videos override the config."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("videos", nargs="*", metavar="VIDEO_OR_FOLDER", help="footage; key=value overrides the config")
    parser.add_argument("--out", required=True, help="folder for the prepared clips, or an address such as s3://b/set")
    parser.add_argument("--local", type=Path, metavar="DIR", help="with an address: prepare here, then upload")
    parser.add_argument("--config", required=True, help="the video config; its encoders are used")
    parser.add_argument(FLAG, action="store_true", help="allow classes of other packages in the config")
    parser.add_argument("--fps", type=float, help=f"frames per second (default: prepare.fps, or {DEFAULT_FPS:g})")
    parser.add_argument("--size", help=f"side, or HEIGHTxWIDTH, in pixels (default: prepare.size, or {DEFAULT_SIZE})")
    captions = parser.add_mutually_exclusive_group()
    captions.add_argument("--prompt", help="one caption for all videos")
    captions.add_argument("--captions", metavar="FILE", help="CSV with the columns file,caption")
    parser.add_argument(
        "--preview",
        action="store_true",
        help="decode a few stored scenes into preview.png to check them before training",
    )
    parser.add_argument("--retry-broken", action="store_true", help="retry videos that an earlier run found broken")
    many = parser.add_argument_group("several machines")
    many.add_argument("--shard", metavar="I/N", help="prepare share I of N of the videos; I from 1")
    many.add_argument("--engine", choices=("local", "ray"), default="local", help="where to prepare (default: local)")
    many.add_argument("--address", help="Ray cluster, host:port or auto (default: start Ray on this machine)")
    many.add_argument("--worker-cpus", type=int, metavar="N", help="CPU cores of each Ray worker (default: 1)")
    world = parser.add_argument_group("procedural world instead of footage")
    world.add_argument("--world", type=int, metavar="N", help="draw N clips; a larger N adds clips")
    world.add_argument("--looks", metavar="A,B,...", help="styles, used in turn; or moving, still, all (default: all)")
    world.add_argument("--frames", type=int, help=f"frames per clip, 1: single images (default: {DEFAULT_FRAMES})")
    world.add_argument("--seed", type=int, help="seed of the clips (default: 0)")
    world.add_argument("--processes", type=int, metavar="N", help="drawing processes (default: one per CPU core)")
    parsed = parser.parse_intermixed_args(arguments)
    parsed.overrides = [text for text in parsed.videos if "=" in text and not Path(text).exists()]
    parsed.videos = [text for text in parsed.videos if text not in parsed.overrides]
    if parsed.world is None:
        if not parsed.videos:
            parser.error("give at least one video or folder, or --world N")
        if given := [name for name in ("looks", "frames", "seed", "processes") if vars(parsed)[name] is not None]:
            parser.error(f"--{given[0]} requires --world N")
    elif parsed.videos or parsed.prompt is not None or parsed.captions is not None:
        parser.error("--world makes its own clips and captions; omit videos, --prompt and --captions")
    for flag in ("processes", "worker_cpus"):
        if (count := vars(parsed)[flag]) is not None and count < 1:
            parser.error(f"--{flag.replace('_', '-')}: expected at least 1, found {count}")
    if parsed.engine == "ray" and (parsed.shard is not None or parsed.processes is not None):
        parser.error(f"--{'shard' if parsed.shard else 'processes'} requires the local engine; omit --engine ray")
    if parsed.engine == "local" and (parsed.address is not None or parsed.worker_cpus is not None):
        parser.error(f"--{'address' if parsed.address else 'worker-cpus'} requires --engine ray")
    read_output(parsed)
    parsed.share = read_share(parsed.shard)
    return parsed


def read_output(parsed: argparse.Namespace) -> None:
    """Set `out`, the folder that is filled, and `upload`, the address it is uploaded to or None; raises UserError."""
    target = place_of(parsed.out)
    parsed.upload = target if isinstance(target, Address) else None
    if parsed.upload is None:
        if parsed.local is not None:
            raise UserError(f"--local: expected an address at --out, found the folder {target}; omit --local")
        parsed.out = target
        return
    check_writable(parsed.upload)
    if parsed.local is None:
        raise UserError(
            f"--out {target}: expected --local DIR too, a folder where the clips are prepared before the upload; it is "
            "kept, and the next run skips what it holds"
        )
    parsed.out = parsed.local


def read_share(text: str | None) -> tuple[int, int]:
    """(i, n) from --shard, (1, 1) without it; raises UserError."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text or "1/1")
    share = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= share[0] <= share[1]:
        raise UserError(f"--shard: expected I/N with I from 1 to N, such as 3/16, found {text!r}")
    return share


def read_size(arguments: argparse.Namespace, defaults: dict[str, Any]) -> list[int]:
    """[height, width] from --size, or the config's prepare.size; raises UserError unless both are multiples of 64."""
    where, given = "--size", arguments.size
    if given is None:
        where, given = "prepare.size", defaults.get("size", DEFAULT_SIZE)
    size = list(parse_size(given, where))
    nearest = [max(SIZE_STEP, round(side / SIZE_STEP) * SIZE_STEP) for side in size]
    if nearest != size:
        raise UserError(
            f"{where}: expected multiples of {SIZE_STEP}, found {given}; the nearest is {nearest[0]}x{nearest[1]} "
            "(height x width)"
        )
    return size


def read_settings(arguments: argparse.Namespace, config: DictConfig) -> EncodingSettings:
    """The settings of all scenes, from the command line, the config and its encoders; raises UserError."""
    defaults = dict(config.get("prepare") or {})
    if unknown := set(defaults) - {"fps", "size"}:
        raise UserError(f"prepare.{min(unknown)}: expected the keys fps and size in this section")
    fps = arguments.fps if arguments.fps is not None else float(defaults.get("fps", DEFAULT_FPS))
    if not 0 < fps < float("inf"):
        raise UserError(f"--fps: expected frames per second above 0, found {fps:g}")
    size = read_size(arguments, defaults)
    first_stage, text_encoder = identities(config)
    return EncodingSettings(
        first_stage=first_stage,
        text_encoder=text_encoder,
        scale_factor=checkpoint.latent_scale(config),
        fps=fps,
        size=size,
        num_tokens=int((config.model.params.cond_stage_config.get("params") or {}).get("max_length", 77)),
    )


def prepare_all(
    plan: PreparePlan, ready: Iterable[Source], preparation: Preparation, encoders: Encoders, progress: Progress
) -> None:
    """Prepare the sources in order; broken ones are recorded in the plan."""
    expected = [source.num_frames for source in plan.sources]
    task = progress.add_task("encoding", total=sum(expected))
    done, remaining = 0, sum(expected)
    for number, source in enumerate(ready):
        progress.update(task, description=f"encoding {source.name} ({number + 1} of {len(expected)})")
        try:
            report = prepare_source(source, preparation, encoders, lambda count: progress.advance(task, count))
            done += report.num_frames
        except FootageError as error:
            note_broken(plan, source, str(error), preparation)
        remaining -= expected[number]
        progress.update(task, completed=done, total=done + remaining)


def note_broken(plan: PreparePlan, source: Source, reason: str, preparation: Preparation) -> None:
    """Record why a source cannot be prepared: in the plan and, if it is an existing video, for later runs."""
    path = source.path if isinstance(source, VideoSource) else source.name
    plan.unusable[source.name] = reason.removeprefix(f"{path}: ")
    if isinstance(source, VideoSource) and source.path.is_file():
        preparation.note_broken(source.name, source.sha256, plan.unusable[source.name])


def prepare_on_ray(
    plan: PreparePlan, preparation: Preparation, config: DictConfig, given: argparse.Namespace, progress: Progress
) -> dict[str, str]:
    """Prepare on a Ray cluster; returns truncated captions and what was cut of them."""
    ray = import_ray_workers()
    options = ray.WorkerOptions(to_container(config), preparation.settings, is_trusted(), given.worker_cpus or 1)
    task = progress.add_task("starting workers", total=sum(source.num_frames for source in plan.sources))
    pool = ray.WorkerPool(options, given.address)
    try:
        empty, lost = pool.check_captions(captions_of(plan))
        if not preparation.has_empty_context:
            preparation.store_empty_context(empty)
        for number, (source, report, reason) in enumerate(pool.prepare(plan.sources, preparation), 1):
            if report is None:
                note_broken(plan, source, reason, preparation)
            progress.update(task, description=f"encoding ({number} of {len(plan.sources)})", advance=source.num_frames)
    finally:
        pool.close()
    return lost


def import_ray_workers() -> ModuleType:
    """`ldm.data.preparing.ray`; raises UserError without the optional package ray."""
    try:
        return importlib.import_module("ldm.data.preparing.ray")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UserError('--engine ray: the package ray is missing; pip install -e ".[ray]"') from error


def captions_of(plan: PreparePlan) -> list[str]:
    """The distinct captions of the videos to prepare; captions of the procedural world are never too long."""
    videos = (source for source in plan.sources if isinstance(source, VideoSource))
    return list(dict.fromkeys(caption for source in videos for caption in source.captions))


def warn_of_cut_captions(lost: dict[str, str], console: Console) -> None:
    """Warn of captions that the text encoder truncates; lost: caption -> the part that was cut."""
    for caption, end in lost.items():
        console.print(
            f"warning: the caption '{caption[:40]}...' ({len(caption.split())} words) is too long for the "
            f"text encoder; this was cut: '{end}'",
            markup=False,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare clips; raises UserError for invalid options or if no scene was kept."""
    given = parse_arguments(arguments)
    with trusting(given.trust_config):
        run(given, Console())


def run(given: argparse.Namespace, console: Console) -> None:
    """Prepare the sources that a parsed command line names."""
    config = load_config([given.config], given.overrides)
    check(config)
    is_world = given.world is not None
    looks = choose_looks("all" if given.looks is None else given.looks)
    names, captions = ({}, {}) if is_world else find_videos(given, console)
    with console.status("reading the encoders' weights"):
        settings = read_settings(given, config)
    preparation = Preparation(given.out, settings, SHARD_BYTES, given.share)
    encoders: Encoders | None = None
    with make_progress(console) as progress:
        if is_world:
            frames = DEFAULT_FRAMES if given.frames is None else given.frames
            plan = plan_world(given.world, looks, frames, given.seed or 0, preparation, given.share)
        else:
            mine = list(names.items())[given.share[0] - 1 :: given.share[1]]
            tracked = progress.track(mine, description="reading the files")
            plan = plan_videos(tracked, captions, preparation, given.retry_broken)
        if plan.sources and given.engine == "ray":
            warn_of_cut_captions(prepare_on_ray(plan, preparation, config, given, progress), console)
        elif plan.sources:
            encoders = prepare_here(plan, preparation, config, given.processes, progress)
    finish(given, preparation, plan, lambda: encoders or Encoders(config), console)


def prepare_here(
    plan: PreparePlan, preparation: Preparation, config: DictConfig, processes: int | None, progress: Progress
) -> Encoders:
    """Prepare in this process; returns its encoders."""
    encoders = Encoders(config)
    if not preparation.has_empty_context:
        preparation.store_empty_context(encoders.context(""))
    warn_of_cut_captions(encoders.cut_captions(captions_of(plan)), progress.console)
    ready: Iterable[Source] = plan.sources
    if not isinstance(plan.sources[0], VideoSource):
        ready = draw_ahead(plan.sources, preparation.settings, processes or usable_cores())
    prepare_all(plan, ready, preparation, encoders, progress)
    return encoders


def finish(
    given: argparse.Namespace,
    preparation: Preparation,
    plan: PreparePlan,
    encoders: Callable[[], Encoders],
    console: Console,
) -> None:
    """Assemble the prepared folder, print the tables, upload, and write the preview."""
    is_world = given.world is not None
    fresh = [preparation.reports[source.sha256] for source in plan.sources if source.sha256 in preparation.reports]
    if given.share != (1, 1):
        preparation.leave()
        (print_looks if is_world else print_table)(plan, fresh, console)
        console.print(
            f"Share {given.shard}: {len(fresh)} prepared, {len(plan.done)} done before, {len(plan.unusable)} dropped. "
            "When all shares are finished, run the same command without --shard to assemble them.",
            markup=False,
            soft_wrap=True,
        )
        return
    prepared = preparation.finish()
    (print_looks if is_world else print_table)(plan, fresh, console)
    kept = sum(report.num_scenes for report in [*plan.done, *fresh])
    if prepared is None or not kept:
        raise UserError("no scene was kept; the table above gives the reasons")
    console.print(summary(prepared, plan, fresh, is_world), markup=False, highlight=False, soft_wrap=True)
    if given.upload is not None:
        with make_progress(console) as progress:
            task = progress.add_task(f"uploading to {given.upload}", total=num_bytes(prepared))
            sent = upload(prepared, given.upload, lambda count: progress.advance(task, count))
        console.print(f"{given.upload} holds the same set; files uploaded: {sent}.", markup=False, soft_wrap=True)
    if given.preview:
        path = write_preview(prepared, encoders())
        console.print(f"Check {path} before training.", markup=False, soft_wrap=True)


def find_videos(given: argparse.Namespace, console: Console) -> tuple[dict[Path, str], dict[Path, list[str]]]:
    """Names in the data set and captions of all given videos; warns of table rows without a video."""
    names = name_videos(given.videos)
    captions, unknown = find_captions(names, given.prompt, given.captions)
    if unknown:
        listed = ", ".join(unknown)
        console.print(f"warning: {given.captions} names files that were not given: {listed}", markup=False)
    return names, captions


if __name__ == "__main__":
    sys.exit(run_command(main))
