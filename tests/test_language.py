"""Plain technical English: idioms that this project once used do not come back in docstrings, messages or documents."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Idiom -> the standard term.
BANNED = {
    r"whoever": "the user, or name who",
    r"nobody": "no one",
    r"in vain": "without effect",
    r"reckon\w*": "compute",
    r"foretold|foretells?": "predicted",
    r"spoilt": "control (clips)",
    r"strangers?": "untrusted (files)",
    r"laid over|lays? over": "merged onto",
    r"taken up again|gone on with": "resumed",
    r"made anew": "regenerated",
    r"layers? over time|(?:convolutions?|attention) over time": "temporal layers",
    r"drawn world": "procedural world",
    r"(?:is|are|was|were|been|it) told|told (?:of|otherwise|apart)": "given, conditioned on",
    r"lack of memory": "out of memory",
    r"graphics? cards?|(?:a|the|one|each|no|which|of|on|any) (?<!model )cards?": "GPU",
    r"processors?": "CPU",
    r"reading process(?:es)?": "DataLoader worker",
    r"starts? as nothing|as nothing": "initialised to zero",
    r"(?:which|would|is|are|or|as it) else": "otherwise",
    r"so that": "so",
}
PATTERN = re.compile(r"\b(?:" + "|".join(f"(?:{idiom})" for idiom in BANNED) + r")\b", re.IGNORECASE)
CODE = [ROOT / "main.py", *sorted((ROOT / "ldm").rglob("*.py")), *sorted((ROOT / "scripts").rglob("*.py"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
DOCUMENTS = [ROOT / "README.md", ROOT / "Makefile", *sorted(path for part in ("docs", "data", "models")
             for path in (ROOT / part).rglob("*.md"))]  # fmt: skip


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and text that people read: strings and comments of code, comments of YAML, all of a document."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                yield node.lineno, node.value
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
    elif path.suffix == ".yaml":
        yield from ((number, line.partition("#")[2]) for number, line in enumerate(text.splitlines(), 1))
    else:
        yield from enumerate(re.sub(r"`[^`\n]*`", "", text).splitlines(), 1)


def idioms(text: str) -> list[str]:
    return [match[0] for match in PATTERN.finditer(" ".join(text.split()))]


@pytest.mark.parametrize("path", [*CODE, *CONFIGS, *DOCUMENTS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_plain_english(path):
    found = [f"line {line}: {idiom!r}" for line, text in prose_of(path) for idiom in idioms(text)]
    assert found == [], f"write instead: {BANNED}"


@pytest.mark.parametrize(
    "text",
    [
        "Layers over time are trained on the card.", "whoever changes it", "the network is told the frame rate",
        "needs a graphics card", "it starts as nothing", "files from strangers", "runs on a processor",
        "a lack of\n    memory", "the config, laid over", "which is else an error",
    ],
)  # fmt: skip
def test_an_idiom_would_be_found(text):
    assert idioms(text)


def test_ordinary_words_are_not_idioms():
    assert not idioms("The model card says that another user or someone else told you: prompts are words.")
