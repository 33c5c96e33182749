"""What a model card says in numbers, as tables: the files of a bundle, how it samples, how it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint_bundle import BUNDLED, bundle_files, read_bundle
from ldm.checkpoint_files import read_file
from ldm.clip_settings import Training, sampling_defaults

NETWORKS = {
    "autoencoder": "image autoencoder",
    "text_encoder": "text encoder",
    "unet": "UNet, image weights",
    "temporal": "UNet, layers over time",
    "temporal_decoder": "decoder of the autoencoder, layers over time",
}


def bundle_table(folder: Path = BUNDLED) -> str:
    """Each file of a bundle with its network, parameters and size; below them, what clips it was made for.

    Raises `CheckpointError` where the bundle is not whole.
    """
    _, config = read_bundle(folder)
    lines, total_parameters, total_bytes = ["| file | | million parameters | MB |", "|---|---|---|---|"], 0, 0
    for path in bundle_files(folder)[1:]:
        parameters = sum(tensor.numel() for tensor in read_file(path)["state_dict"].values())
        size = path.stat().st_size
        total_parameters, total_bytes = total_parameters + parameters, total_bytes + size
        network = NETWORKS[path.stem.partition("-")[0]]
        lines.append(f"| `{path.name}` | {network} | {parameters / 1e6:.2f} | {size / 1e6:.1f} |")
    lines.append(f"| all | | {total_parameters / 1e6:.2f} | {total_bytes / 1e6:.1f} |")
    trained = Training.of_config(config, has_time=True)
    words = {
        "trained on clips of": f"{trained.frames} frames",
        "at": ", ".join(f"{rate:g}" for rate in trained.rates) + " frames a second",
        "of": "x".join(map(str, trained.size or ())) + " pixels",
    }
    defaults = sampling_defaults(config).items()
    lines += ["", "| " + " | ".join([*words, *(f"`--{word}`" for word, _ in defaults)]) + " |"]
    lines.append("|---" * (len(words) + len(defaults)) + "|")
    lines.append("| " + " | ".join([*words.values(), *(f"{value}" for _, value in defaults)]) + " |")
    return "\n".join(lines) + "\n"


def training_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The stages that scripts/train_drive.py has trained: steps and minutes."""
    lines = ["| stage | steps | minutes |", "|---|---|---|"]
    lines += [f"| {name} | {stage['steps']:,} | {stage['seconds'] / 60:.1f} |" for name, stage in stages.items()]
    return "\n".join(lines) + "\n"


def is_training(results: Any) -> bool:
    """Whether results are those of scripts/train_drive.py."""
    return (
        isinstance(results, Mapping)
        and len(results) > 0
        and all(isinstance(stage, Mapping) and {"steps", "seconds"} <= stage.keys() for stage in results.values())
    )
