"""Turn a checkpoint of any kind into another kind.

    python scripts/convert.py --in logs/RUN/checkpoints/last.ckpt --out motion.safetensors --format temporal
    python scripts/convert.py --in motion.safetensors --base other.safetensors --out merged.safetensors --format full

What the input is, is recognised: a checkpoint of this project, a .ckpt or .safetensors of Stable Diffusion v1 or of a
part of it, a diffusers folder, the author's later release, or a file of temporal layers alone.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from ldm.checkpoint import Checkpoint, check_unet, read_checkpoint
from ldm.checkpoint.diffusers import write_author, write_diffusers
from ldm.checkpoint.encoders import has_temporal_decoder
from ldm.checkpoint.names import AVERAGE_PREFIX, FIRST_STAGE_PREFIX, TEXT_PREFIX, UNET_PREFIX, Kind
from ldm.checkpoint.temporal import BASE_IDENTITY, base_identity, load_with_temporal
from ldm.checkpoint.writing import bundled, check_output, full_config, write_bundle, write_full, write_temporal
from ldm.errors import Parser, UserError, run_command
from ldm.sampling.generator import ClipGenerator
from ldm.sampling.request import read_request
from ldm.sampling.settings import DEFAULTS

FORMATS = {
    "full": "one file of everything, under CompVis's names (.ckpt or .safetensors)",
    "temporal": "the temporal layers alone (.safetensors), for other image models",
    "diffusers": "a folder of the image part that diffusers loads",
    "author": "a folder in the form of the author's later release",
    "bundle": "a folder of small float16 files, each below 16 MB, all below 48 MB, as in models/drive",
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    formats = "\n".join(f"  {name:<11}{what}" for name, what in FORMATS.items())
    parser = Parser(
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog=f"formats:\n{formats}\n\nRunning averages of the weights, where the input has them, take the place of "
        "the weights in every\nformat but full, which keeps both.",
    )  # fmt: skip
    parser.add_argument("--in", dest="source", type=Path, required=True, metavar="PATH", help="file or folder to read")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="file or folder to write")
    parser.add_argument("--format", choices=FORMATS, required=True, help="what to write, see below")
    parser.add_argument("--base", type=Path, metavar="PATH", help="image model to put temporal layers alone into")
    parser.add_argument(
        "--sampling", nargs="+", metavar="WORD=VALUE", default=[],
        help=f"for a bundle: defaults of sampling ({', '.join(DEFAULTS)})",
    )  # fmt: skip
    parser.add_argument("--text", type=Path, metavar="PATH", help="for a bundle: checkpoint of another text encoder")
    parser.add_argument(
        "--decoder", type=Path, metavar="PATH", help="for a bundle: autoencoder with a decoder trained further"
    )
    parser.add_argument(
        "--temporal-decoder", type=Path, metavar="PATH", help="for a bundle: temporal layers for that decoder"
    )
    parser.add_argument("--half", action="store_true", help="write float16: half the size, three significant digits")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    return parser.parse_args(arguments)


def read_input(options: argparse.Namespace, console: Console) -> Checkpoint:
    """The checkpoint to write, merged with its base where it is temporal layers alone; what it is gets printed."""
    found = read_checkpoint(options.source)
    console.print(f"in:   {options.source}: {found.kind.description}, {in_numbers(found)}, {size(options.source)}")
    if found.kind is not Kind.TEMPORAL:
        if options.base is not None:
            raise UserError(
                f"--base: belongs to a file of temporal layers alone, and {options.source} is "
                f"{found.kind.description}; leave it out"
            )
        check_unet(found)
        return found
    if options.format == "temporal":
        raise UserError(f"--in: {options.source} is a file of temporal layers alone already; choose another format")
    if options.base is None:
        raise UserError(
            f"--base: {options.source} holds temporal layers alone; give the image model to put them into: --base FILE"
        )
    base = read_checkpoint(options.base)
    console.print(f"base: {options.base}: {base.kind.description}, {in_numbers(base)}, {size(options.base)}")
    check_unet(base)
    merged = load_with_temporal(base, found)
    if merged.warning:
        console.print(f"note: {merged.warning}")
    return merged.checkpoint


def read_sampling(words: Sequence[str]) -> dict[str, Any]:
    """The defaults of sampling in words such as steps=16; raises UserError."""
    for word in words:
        if not re.fullmatch(r"\w+=.+", word):
            raise UserError(f"--sampling: expected words such as steps=16, found {word!r}")
    return OmegaConf.to_container(OmegaConf.from_dotlist(list(words)))


def refuse_for_others(options: argparse.Namespace) -> None:
    """Raise UserError for options that belong to a bundle where none is written, and the other way round."""
    if options.format == "bundle":
        if options.half:
            raise UserError("--half: a bundle is always float16; leave it out")
        return
    for name in ("sampling", "text", "decoder", "temporal_decoder"):
        if getattr(options, name):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: belongs to --format bundle, found --format {options.format}; leave it out")


def bundle(checkpoint: Checkpoint, options: argparse.Namespace) -> Checkpoint:
    """What goes into a bundle, after a look whether clips can be asked of it; raises UserError."""
    paths = options.text, options.decoder, options.temporal_decoder
    others = (None if path is None else read_checkpoint(path) for path in paths)
    result = bundled(checkpoint, read_sampling(options.sampling), *others)
    read_request({"prompt": "a road"}, ClipGenerator(result))
    return result


def in_numbers(checkpoint: Checkpoint) -> str:
    """How many tensors and parameters; averages are parameters only where they stand alone."""
    parts = (UNET_PREFIX, FIRST_STAGE_PREFIX, TEXT_PREFIX)
    num_parameters = sum(tensor.numel() for name, tensor in checkpoint.tensors.items() if name.startswith(parts))
    num_averages = sum(name.startswith(AVERAGE_PREFIX) for name in checkpoint.tensors)
    averages = f" and {num_averages:,} averages" if num_averages else ""
    return f"{len(checkpoint.tensors) - num_averages:,} tensors{averages}, {num_parameters / 1e6:,.1f} M parameters"


def size(path: Path) -> str:
    """Size of a file, or of all files of a folder."""
    return f"{num_bytes(path) / 1e6:,.1f} MB"


def num_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(one.stat().st_size for one in files)


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert what the command line says."""
    options = parse_arguments(arguments)
    refuse_for_others(options)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    inputs = [options.source, options.base, options.text, options.decoder, options.temporal_decoder]
    inputs = [path for path in inputs if path is not None]
    check_output(options.out, options.format, inputs, options.overwrite)
    with console.status("converting"):
        checkpoint = read_input(options, console)
        notes = write(checkpoint, options)
        written = read_checkpoint(options.out)
        identity = written.metadata[BASE_IDENTITY] if written.kind is Kind.TEMPORAL else base_identity(written)
    share = num_bytes(options.out) / num_bytes(options.base or options.source)
    console.print(
        f"out:  {options.out}: {written.kind.description}, {in_numbers(written)}, {size(options.out)} "
        f"({share:.0%} of the {'base' if options.base else 'input'})"
    )
    console.print(f"image weights of the UNet: sha256 {identity}")
    for note in notes:
        console.print(f"note: {note}")


def write(checkpoint: Checkpoint, options: argparse.Namespace) -> list[str]:
    """Write the checkpoint in the format asked for; returns what a user should know."""
    if options.format in ("diffusers", "author"):
        export = write_diffusers if options.format == "diffusers" else write_author
        return export(checkpoint, options.out, options.half)
    if options.format == "bundle":
        write_bundle(bundle(checkpoint, options), options.out)
        is_lost = options.decoder and not options.temporal_decoder and has_temporal_decoder(checkpoint)
        return ["the temporal decoder was left out: it was trained with the decoder that is replaced"] * bool(is_lost)
    if options.format == "full":
        write_full(checkpoint, options.out, options.half)
        has_encoders = any(name.startswith((FIRST_STAGE_PREFIX, TEXT_PREFIX)) for name in checkpoint.tensors)
        params = full_config(checkpoint)["model"]["params"]
        if has_encoders and not {"first_stage_config", "cond_stage_config"} <= set(params):
            return ["the encoders are of other sizes than Stable Diffusion v1's: the file needs a config to sample"]
        return []
    write_temporal(checkpoint, options.out, options.half)
    if checkpoint.config is None:
        return ["the input does not say what was trained; if it was more than temporal layers, it is not in this file"]
    return []


if __name__ == "__main__":
    sys.exit(run_command(main))
