"""The order of the house: which module may import what, read from the source without running it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "ldm").rglob("*.py"))
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}
MODELS = {"diffusers", "transformers"}

# Part of the house -> what it may import beside the standard library. The first prefix that fits counts.
ALLOWED = {
    "ldm/modules/encoders.py": {"torch", "einops", "numpy", "diffusers", "transformers", "ldm.errors", "ldm.modules"}
    | {"ldm.checkpoint_names", "ldm.checkpoint_reading", "ldm.checkpoint_folder"}  # the encoders load themselves
    | {"taming"},
    "ldm/modules/tokenizer.py": {"transformers", "huggingface_hub", "ldm.errors"},
    "ldm/modules/temporal_kernel.py": {"torch", "triton"},
    "ldm/modules/": {"torch", "einops", "ldm.errors", "ldm.modules"},
    "ldm/models/diffusion/schedule.py": {"torch", "ldm.errors"},
    "ldm/models/diffusion/noise.py": {"torch", "ldm.errors"},
    "ldm/models/diffusion/filling.py": {"torch", "ldm.errors"},
    "ldm/models/diffusion/known_mixture.py": {"torch", "ldm.errors", "ldm.models.diffusion.filling"},
    "ldm/evaluation/flow.py": {"numpy", "cv2", "ldm.errors"},
    "ldm/evaluation/motion.py": {"numpy", "cv2", "ldm.evaluation"},
    "ldm/evaluation/references.py": {"numpy", "cv2", "ldm.evaluation"},
    "ldm/evaluation/statistics.py": {"numpy"},
    "ldm/evaluation/outlook.py": {"numpy", "ldm.evaluation.statistics"},
    "ldm/evaluation/learning_curve.py": {"ldm.errors", "ldm.json_text", "ldm.evaluation"},
    "ldm/evaluation/judge.py": {"torch", "numpy", "safetensors", "ldm.errors", "ldm.atomic", "ldm.video"}
    | {"ldm.modules.frame_tower", "ldm.json_text"},
    "ldm/evaluation/frechet.py": {"numpy", "ldm.evaluation.statistics"},
    "ldm/evaluation/agreement.py": {"numpy", "ldm.evaluation", "ldm.data.world_captions"},
    "ldm/evaluation/extractors.py": {"numpy", "ldm.evaluation"},
    "ldm/errors.py": set(),
    "ldm/atomic.py": set(),
    "ldm/json_text.py": set(),
    "ldm/checkpoint_header.py": set(),
    "ldm/config_text.py": {"yaml"},
}
MAY_USE_LIGHTNING = (
    "ldm/models/diffusion/ddpm.py",
    "ldm/models/autoencoder",
    "ldm/models/look_classifier.py",
    "ldm/models/text_image.py",
    "ldm/models/temporal_decoder.py",
    "ldm/data/stream.py",
    "ldm/callbacks/",
    "ldm/benchmarking/config_steps.py",
    "ldm/distributed.py",
    "ldm/distributed_launch.py",
)
MAY_USE_MODELS = (
    "ldm/modules/encoders.py",
    "ldm/modules/tokenizer.py",
    "ldm/models/autoencoder",
    "ldm/models/diffusion/sampling.py",
    "ldm/checkpoint",
    "ldm/evaluation/agreement_clip.py",
)
# What of the evaluation looks at clips with a network; the rest measures without one.
MAY_EVALUATE_WITH_TORCH = (
    "ldm/evaluation/judge.py",
    "ldm/evaluation/extractor_i3d.py",
    "ldm/evaluation/agreement_clip.py",
)
# One way: what is on the left never imports what is on the right.
NEVER = {
    "ldm/": {"scripts", "main", "tests"},
    "ldm/data/": {"ldm.models", "ldm.callbacks", "ldm.training_run"},
    "ldm/models/": {"ldm.callbacks", "ldm.training_run"},
    "ldm/models/diffusion/sampling.py": {"ldm.modules", "ldm.models.diffusion.ddpm"},
    "ldm/models/diffusion/known.py": {"ldm.modules", "ldm.models.diffusion.ddpm", "ldm.models.diffusion.sampling"},
    "ldm/models/diffusion/stages.py": {"ldm.modules", "ldm.models.diffusion.ddpm", "ldm.models.diffusion.sampling"},
    "ldm/models/diffusion/windows.py": {"ldm.modules", "ldm.models.diffusion.sampling"},
    "ldm/checkpoint": {"ldm.data", "ldm.callbacks", "ldm.training_run", "ldm.models.diffusion.ddpm"},
    "ldm/evaluation/": {"ldm.models", "ldm.modules", "ldm.checkpoint", "ldm.callbacks", "ldm.training_run"},
    "ldm/config": {"ldm.data", "ldm.models", "ldm.modules", "ldm.checkpoint", "ldm.callbacks"},
    "ldm/video.py": {"ldm.data", "ldm.models", "ldm.modules", "ldm.checkpoint"},
}

EXCEPT = {"ldm/evaluation/judge.py": {"ldm.modules.frame_tower"}}  # the network that it is


def imports(source: str, package: str = "") -> set[str]:
    """Dotted names of everything a module imports, at any depth, and `from x import y` also as `x.y`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {package}"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def inside(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def mistakes(where: str, source: str) -> list[str]:
    """What is wrong with the imports and calls of one file."""
    names = imports(source, where)
    found = [f"imports {name}" for prefix, never in NEVER.items() if where.startswith(prefix)
             for name in names if inside(name, never) and not inside(name, EXCEPT.get(where, set()))]  # fmt: skip
    if not where.startswith(MAY_USE_LIGHTNING):
        found += [f"imports {name}: Lightning is for the rim" for name in names if inside(name, LIGHTNING)]
    if not where.startswith(MAY_USE_MODELS):
        found += [f"imports {name}" for name in names if inside(name, MODELS)]
    if where.startswith("ldm/evaluation/") and not where.startswith(MAY_EVALUATE_WITH_TORCH):
        found += [f"imports {name}" for name in names if inside(name, {"torch"})]
    allowed = next((allowed for prefix, allowed in ALLOWED.items() if where.startswith(prefix)), None)
    if allowed is not None:
        foreign = {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}
        found += [f"imports {name}" for name in foreign if not inside(name, allowed)]
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    if any(isinstance(function, ast.Name) and function.id == "print" for function in calls):
        found.append("calls print: use logging")
    return sorted(found)


@pytest.mark.parametrize("path", SOURCES, ids=place)
def test_imports_run_one_way(path):
    assert mistakes(place(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("ldm/video.py", "import main"),
        ("ldm/video.py", "def f():\n    from scripts import prepare"),
        ("ldm/video.py", "from ldm.modules import unet"),
        ("ldm/video.py", "print(1)"),
        ("ldm/checkpoint.py", "from pytorch_lightning import Trainer"),
        ("ldm/config.py", "import pytorch_lightning as pl"),
        ("ldm/data/shards.py", "import transformers.models.clip"),
        ("ldm/data/clips.py", "from ldm.models.diffusion.ddpm import LatentVideoDiffusion"),
        ("ldm/evaluation/report.py", "import torch"),
        ("ldm/evaluation/judge.py", "from ldm.modules import unet"),
        ("ldm/modules/unet.py", "import diffusers"),
        ("ldm/modules/unet.py", "from ldm.models.diffusion import schedule"),
        ("ldm/modules/unet.py", "import numpy"),
        ("ldm/models/diffusion/schedule.py", "import einops"),
        ("ldm/models/diffusion/ddpm.py", "from ldm.callbacks import WeightAverage"),
        ("ldm/models/diffusion/sampling.py", "from ldm.modules.unet import UNetModel"),
    ],
)
def test_a_breach_would_be_found(where, source):
    assert mistakes(where, source)


def test_no_names_that_say_nothing():
    nothing = {"utils", "util", "helpers", "misc", "common", "tools"}
    paths = [path for part in ("ldm", "scripts") for path in (ROOT / part).rglob("*.py")]
    assert not [place(path) for path in paths if path.stem in nothing or path.parent.name in nothing]


def test_nothing_of_ours_swallows_arguments():
    """A constructor with **kwargs would let a misspelt config key go unnoticed."""
    found = [
        f"{place(path)}:{node.lineno}"
        for path in SOURCES
        for owner in ast.walk(ast.parse(path.read_text()))
        if isinstance(owner, ast.ClassDef) and not owner.name.startswith("_")
        for node in owner.body
        if isinstance(node, ast.FunctionDef) and node.name == "__init__" and node.args.kwarg
    ]
    assert found == []
