"""The rules of the house: which package may import which, read from the source without running it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "ldm").rglob("*.py"))
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}

# Package -> the packages of ours that it may import. A package imports only from lines above its own.
ALLOWED = {
    "ldm.errors": "",
    "ldm.files": "errors",
    "ldm.video": "errors files",
    "ldm.devices": "errors",
    "ldm.sharding": "errors",
    "ldm.config": "errors files",
    "ldm.diffusion": "errors",
    "ldm.modules": "errors",
    "ldm.optim": "errors config sharding diffusion modules",
    "ldm.checkpoint": "errors files config diffusion modules optim",
    "ldm.data.shards": "errors files config",
    "ldm.data.preparing": "errors files video config modules checkpoint data.shards",
    "ldm.data": "errors files video config data.shards data.preparing",
    "ldm.data.world": "errors files video config data data.shards data.preparing",
    "ldm.sampling": "errors files video devices config diffusion modules checkpoint data.preparing",
    "ldm.evaluation": "errors files video modules data.preparing data.world",
    "ldm.planning": "errors video config diffusion modules checkpoint optim data.shards",
    "ldm.models": "errors video sharding config diffusion modules checkpoint optim data data.world sampling evaluation",
    "ldm.runs": "errors files sharding config checkpoint optim data.shards sampling",
    "ldm.experiments": "errors files video devices config diffusion modules checkpoint data.world sampling evaluation",
    "ldm.callbacks": "errors files video devices sharding diffusion modules checkpoint optim data sampling evaluation"
    " planning runs",
}
# Foreign packages that only some of ours may import.
ONLY = {
    "pytorch_lightning": ("ldm.models", "ldm.callbacks", "ldm.runs", "ldm.data.stream"),
    "diffusers": ("ldm.modules.encoders", "ldm.checkpoint", "ldm.sampling.loop", "ldm.models.autoencoder"),
    "transformers": ("ldm.modules.encoders", "ldm.modules.tokenizer", "ldm.checkpoint", "ldm.evaluation"),
}
# What modules and diffusion may import beside the standard library: networks and noise are plain torch.
TORCH_ONLY = {
    "ldm.diffusion": {"torch"},
    "ldm.modules.encoders": {"torch", "einops", "numpy", "diffusers", "transformers", "taming"},
    "ldm.modules.tokenizer": {"transformers", "huggingface_hub"},
    "ldm.modules.backends": {"torch", "triton", "einops"},
    "ldm.modules": {"torch", "einops"},
    "ldm.errors": set(),
    "ldm.files": set(),
}
# Of the evaluation, what looks at clips with a network; the rest measures without torch.
EVALUATES_WITH_TORCH = ("ldm.evaluation.look_judge", "ldm.evaluation.features", "ldm.evaluation.text_alignment")


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for path in SOURCES}


def imported(source: str) -> Iterator[str]:
    """Dotted names of everything a module imports, at any depth and below TYPE_CHECKING; modules by their own name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)


def package_of(module: str) -> str:
    """The longest entry of ALLOWED that the module lies in."""
    return max((name for name in ALLOWED if f"{module}.".startswith(f"{name}.")), key=len, default=module)


def lies_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def mistakes(module: str, source: str) -> list[str]:
    """What is wrong with the imports and calls of one module."""
    here, found = package_of(module), []
    allowed = {here, "ldm", *(f"ldm.{name}" for name in ALLOWED.get(here, "").split())}
    foreign = next((names for prefix, names in TORCH_ONLY.items() if lies_in(module, (prefix,))), None)
    for name in set(imported(source)):
        top = name.partition(".")[0]
        if top in ("scripts", "main", "tests"):
            found.append(f"imports {name}")
        elif top == "ldm":
            if package_of(name) not in allowed:
                found.append(f"imports {name}: {here} may import {ALLOWED.get(here, '')}")
        else:
            owner = "pytorch_lightning" if top in LIGHTNING else top
            if owner in ONLY and not lies_in(module, ONLY[owner]):
                found.append(f"imports {name}: only {', '.join(ONLY[owner])} may")
            if foreign is not None and top not in foreign and top not in sys.stdlib_module_names:
                found.append(f"imports {name}")
            if top == "torch" and here == "ldm.evaluation" and not lies_in(module, EVALUATES_WITH_TORCH):
                found.append(f"imports {name}")
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    if any(isinstance(function, ast.Name) and function.id == "print" for function in calls):
        found.append("calls print: use logging")
    return sorted(found)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    assert mistakes(module, MODULES[module].read_text()) == []


def test_the_table_runs_one_way():
    """Each package imports only those above it; a parent may stand below a part of it."""
    seen = []
    for package, names in ALLOWED.items():
        assert [name for name in names.split() if f"ldm.{name}" not in seen] == [], package
        seen.append(package)


def test_no_import_circles():
    graph = {module: {name for name in imported(path.read_text()) if name in MODULES and name != module}
             for module, path in MODULES.items()}  # fmt: skip
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ldm.video", "import main"),
        ("ldm.video", "def f():\n    from scripts import prepare"),
        ("ldm.video", "from ldm.modules import unet"),
        ("ldm.video", "print(1)"),
        ("ldm.checkpoint.reading", "from pytorch_lightning import Trainer"),
        ("ldm.config", "import pytorch_lightning as pl"),
        ("ldm.data.shards", "import transformers.models.clip"),
        ("ldm.data.shards", "from ldm.data.clips import ClipDataModule"),
        ("ldm.data.clips", "from ldm.models.diffusion.ddpm import LatentVideoDiffusion"),
        ("ldm.evaluation.report", "import torch"),
        ("ldm.modules.unet", "import diffusers"),
        ("ldm.modules.unet", "from ldm.diffusion import schedule"),
        ("ldm.modules.unet", "import numpy"),
        ("ldm.diffusion.schedule", "import einops"),
        ("ldm.models.diffusion.ddpm", "from ldm.callbacks import WeightAverage"),
        ("ldm.sampling.loop", "from ldm.models.diffusion.ddpm import LatentVideoDiffusion"),
    ],
)
def test_a_breach_would_be_found(module, source):
    assert mistakes(module, source)


def test_few_modules_lie_in_the_root():
    assert len(list((ROOT / "ldm").glob("*.py"))) <= 6


def test_no_names_that_say_nothing():
    nothing = {"utils", "util", "helpers", "misc", "common", "tools"}
    paths = [path for part in ("ldm", "scripts") for path in (ROOT / part).rglob("*.py")]
    assert not [dotted(path) for path in paths if path.stem in nothing or path.parent.name in nothing]


def test_nothing_of_ours_swallows_arguments():
    """A constructor with **kwargs would let a misspelt config key go unnoticed."""
    found = [
        f"{module}:{node.lineno}"
        for module, path in MODULES.items()
        for owner in ast.walk(ast.parse(path.read_text()))
        if isinstance(owner, ast.ClassDef) and not owner.name.startswith("_")
        for node in owner.body
        if isinstance(node, ast.FunctionDef) and node.name == "__init__" and node.args.kwarg
    ]
    assert found == []
