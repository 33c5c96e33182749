"""Shared fixtures: golden numbers, the rule that fills weights, prepared folders, a toy run."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm.config.schema import trusting
from ldm.runs.folder import RUN_TIME_VARIABLE
from tests.made_clips import contents, fill
from tests.toy_run import toy_config

GOLDENS = Path(__file__).parent / "goldens"
HIGHWAY = Path(__file__).parents[2] / "shared" / "data" / "highway.mp4"

torch.set_num_threads(1)  # tiny tensors; a second thread costs more than it gives


def pytest_configure(config: pytest.Config) -> None:
    """Silence what Lightning says of runs as short as a test's."""
    for message in ("You're resuming from a checkpoint that ended before", "The number of training batches"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests start whole runs and processes, which take long on a busy machine."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))


def golden_tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value the reference run gave the parameter `key`: unit fan-in gain, from a frozen random stream."""
    values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape))
    if len(shape) > 1:
        values = values / np.sqrt(np.prod(shape[1:]))
    else:
        values = 0.1 * values + (1.0 if key.endswith(".weight") else 0.0)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def fill_by_rule(names_and_shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """A state dict with every tensor given by `golden_tensor`."""
    return {name: golden_tensor(name, tuple(shape)) for name, shape in names_and_shapes.items()}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|, L2 norms in float64."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal float32 numbers, the same ones for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def goldens():
    """`goldens("unet")` -> dict of tensors recorded from the public reference implementations."""

    def load(name: str) -> dict[str, torch.Tensor]:
        return load_file(GOLDENS / f"{name}.safetensors")

    return load


@pytest.fixture(scope="session")
def golden_configs() -> dict:
    return json.loads((GOLDENS / "goldens.json").read_text())["configs"]


@pytest.fixture(scope="session")
def highway() -> Path:
    """Real footage beside the checkout; tests that need it are skipped without it."""
    if not HIGHWAY.is_file():
        pytest.skip("needs the real footage beside the checkout")
    return HIGHWAY


@pytest.fixture(scope="session")
def golden_numbers() -> dict:
    return json.loads((GOLDENS / "goldens.json").read_text())


@pytest.fixture(scope="session")
def golden_keys() -> dict:
    """Names, shapes and dtypes of the public Stable Diffusion v1 checkpoint: `keys` (1143) and `ema_keys` (688)."""
    return json.loads((GOLDENS / "sd_v1_keys.json").read_text())


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """A prepared folder of random numbers, read only."""
    folder = tmp_path_factory.mktemp("prepared") / "set"
    fill(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy of it, to be corrupted."""
    copy = tmp_path / "set"
    copy.mkdir()
    for name, content in contents(original).items():
        (copy / name).write_bytes(content)
    return copy


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A config that trains the toy model on a prepared folder, both in the temporary folder."""
    monkeypatch.delenv(RUN_TIME_VARIABLE, raising=False)
    with trusting():
        yield toy_config(tmp_path)
