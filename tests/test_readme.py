"""README and docs: commands parse, links and named files exist, the README stays short; conda matches setup.py."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest
import setuptools
import yaml

from ldm.config import check, load_config
from ldm.errors import Parser
from ldm.runs.arguments import parse_arguments
from scripts import prepare, txt2vid

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ENCODER = "model.params.first_stage_config.params.ckpt_path=last.ckpt"
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = sorted(
    {line.partition("  #")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()}
)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python ")])
def test_commands_parse(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, script, *arguments = shlex.split(line.replace("$ENCODER", ENCODER))
    if script == "main.py":
        options = parse_arguments(arguments)
        check(load_config(options.base, options.overrides))
        assert options.train
    elif script == "scripts/prepare.py":
        options = prepare.parse_arguments(arguments)
        check(load_config([options.config], options.overrides))
        assert options.videos == ["my_videos"]
    elif script == "scripts/txt2vid.py":
        options = txt2vid.parse_arguments(arguments)
        assert options.prompt and getattr(options, "frames", 5) > 4
    else:
        names = ("evaluate", "train_drive", "ablate", "curves", "plan", "compare", "convert")
        assert script in {f"scripts/{name}.py" for name in names}
        assert parsed_by(script, arguments, monkeypatch)


class ParsedError(Exception):
    """Raised after a command line was parsed, before the command runs."""


def parsed_by(script: str, given: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a script accepts these arguments; the command itself does not run."""
    kinds = {"scripts/ablate.py": "parse_known_args", "scripts/dev/benchmark.py": "parse_intermixed_args"}
    parse = kinds.get(script, "parse_args")
    original = getattr(Parser, parse)

    def stop(parser: Parser, *arguments: object) -> None:
        raise ParsedError(original(parser, *arguments))

    monkeypatch.setattr(Parser, parse, stop)
    with pytest.raises(ParsedError):
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(given)
    return True


def test_the_readme_shows_only_known_commands():
    others = {line.partition("=")[0].partition(" ")[0] for line in COMMANDS if not line.startswith("python ")}
    assert others <= {"ENCODER", "make setup", "make demo", "make demo-train", "source", "make"}


DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / n / "README.md" for n in ("data", "models/drive")),
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_link_targets_exist(path):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 180 and len(README.split()) <= 1600
    is_prose, found = True, []
    for line in lines:
        is_prose = is_prose != line.startswith("```")
        if is_prose and not line.startswith(("|", "!", "```")) and len(line) > 120:
            found.append(line)
    assert found == []


def test_files_named_in_the_architecture_exist():
    """The table of what to edit for a change, and the batch-flow tables."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    names = set(re.findall(r"`((?:ldm|scripts)/[\w/.]+)`", text)) | {
        f"ldm/{name}" for name in re.findall(r"`((?:data|diffusion|models|modules|sampling)/[\w/]+\.py)`", text)
    }
    assert len(names) > 30 and [name for name in names if not (ROOT / name).exists()] == []


def test_conda_environment_matches_setup(monkeypatch):
    asked = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: asked.update(options))
    runpy.run_path(str(ROOT / "setup.py"))
    wanted = [*asked["install_requires"], *asked["extras_require"]["dev"]]
    entries = yaml.safe_load((ROOT / "environment.yaml").read_text())["dependencies"]
    installed = [entry for entry in entries if isinstance(entry, str)]
    installed += next(entry["pip"] for entry in entries if isinstance(entry, dict))
    wanted = {re.sub(r"^torch(?=>|$)", "pytorch", requirement.replace(" ", "")) for requirement in wanted}
    assert wanted - {entry.replace(" ", "") for entry in installed} == set()
