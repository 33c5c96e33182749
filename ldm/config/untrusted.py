"""Untrusted YAML: bounds on memory and time, and no access to the machine.

Checked while parsing: size, nesting, the expansion of aliases, and tags, which name Python types. Of OmegaConf's
interpolations only references to other values are allowed; its resolvers read the environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES, MAX_NODES, MAX_DEPTH = 2**20, 10_000, 48
MAX_NUMBER = 400  # characters of a number
MAX_EXPANDED = 100_000  # characters and values of all references together
MAX_CHAIN = 16  # references to references

_REFERENCE = re.compile(r"\$\{(\.*)([\w-]+(?:\.[\w-]+|\[[\w-]+\])*)\}")
_NUMERIC = re.compile(r"[-+0-9a-fA-FoxX_.:]+")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

KeyPath = tuple[str, ...]


def checked_text(path: Path, trusted: bool = False) -> str:
    """The text of a YAML file that passes `check_yaml`. Raises ValueError and yaml.YAMLError."""
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    text = content[:MAX_BYTES].decode("utf-8-sig" if len(content) <= MAX_BYTES else "latin-1")
    if len(content) > MAX_BYTES:
        raise ValueError(f"expected at most {MAX_BYTES:,} bytes, found more")
    check_yaml(text, trusted)
    return text


def check_yaml(text: str, trusted: bool = False) -> None:
    """Raise ValueError or yaml.YAMLError for invalid YAML, deep nesting, growth by aliases, and tags.

    trusted: allow interpolations other than `${other.key}`.
    """
    counter = _Counter()
    for event in _events(text):
        try:
            counter.take(event)
            if not trusted and isinstance(event, yaml.ScalarEvent):
                _check_interpolations(event.value)
        except ValueError as error:
            raise ValueError(f"line {event.start_mark.line + 1}: {error}") from None


def _events(text: str) -> Iterator[yaml.Event]:
    """The parser's events; newer parsers have a bound on nesting, above ours."""
    try:
        yield from yaml.parse(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        if "nesting depth" not in (error.problem or ""):
            raise
        raise ValueError(f"line {error.problem_mark.line + 1}: nested deeper than {MAX_DEPTH}") from None


def check_plain(tree: Any) -> None:
    """Raise ValueError unless a tree that was not read from text, such as a pickle's, is as small and plain as YAML.

    Shared values count each time, as in a written or merged tree.
    """
    waiting, count = [(tree, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        inside: list[Any] = []
        if isinstance(value, Mapping):
            inside = [*value.values()]
            if not all(isinstance(key, str | int | float) for key in value):
                raise ValueError("keys that are not strings or numbers")
        elif isinstance(value, list | tuple):
            inside = list(value)
        elif not isinstance(value, str | int | float | None):
            raise ValueError(f"a {type(value).__name__}")
        elif isinstance(value, str):
            value.encode()  # lone surrogates cannot be written
        count += len(inside)
        if depth > MAX_DEPTH or count > 2 * MAX_NODES:
            raise ValueError(f"nested deeper than {MAX_DEPTH} or more than {MAX_NODES:,} values in all")
        waiting += [(part, depth + 1) for part in inside]


def check_references(tree: Mapping[str, Any]) -> None:
    """Raise ValueError for references, `${other.key}`, with an unbounded expansion."""
    _Expansion(tree).size(tree, (), 0)


def _check_interpolations(text: str) -> None:
    if "${" in text and "${" in _REFERENCE.sub("", text):
        raise ValueError(
            f"{text[:80]!r}: an untrusted config may only refer to other values; write ${{other.key}} or the value "
            "itself, or give --trust-config if you know where the config comes from"
        )


class _Counter:
    """Counts the values in YAML, those of an alias at each use."""

    def __init__(self) -> None:
        self.anchored: dict[str, int | None] = {}  # values of each anchor; None while it is open
        self.open: list[tuple[str | None, int]] = [(None, 0)]  # anchor of each open node, values inside it so far

    def take(self, event: yaml.Event) -> None:
        """One event of the parser; raises ValueError."""
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"the tag {event.tag[:80]!r}; only plain values are read")
        if isinstance(event, yaml.CollectionStartEvent):
            if len(self.open) > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH}")
            if event.anchor is not None:
                self.anchored[event.anchor] = None
            self.open.append((event.anchor, 0))
        elif isinstance(event, yaml.CollectionEndEvent):
            self._add(*self.open.pop())
        elif isinstance(event, yaml.AliasEvent):
            nodes = self.anchored.get(event.anchor, 0)  # the loader reports an unknown one
            if nodes is None:
                raise ValueError(f"*{event.anchor[:80]} is inside itself")
            self._add(None, nodes)
        elif isinstance(event, yaml.ScalarEvent):
            if event.implicit[0] and len(event.value) > MAX_NUMBER and _NUMERIC.fullmatch(event.value):
                raise ValueError(f"a number of {len(event.value):,} digits")
            self._add(event.anchor, 0)

    def _add(self, anchor: str | None, nodes: int) -> None:
        if anchor is not None:
            self.anchored[anchor] = nodes + 1
        outer, before = self.open[-1]
        self.open[-1] = outer, before + nodes + 1
        if before + nodes >= MAX_NODES:
            raise ValueError(f"more than {MAX_NODES:,} values, those of aliases counted at each use")


class _Expansion:
    """The expanded size of the references in a tree."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self.tree = tree
        self.known: dict[KeyPath, int] = {}

    def size(self, value: Any, place: KeyPath, chain: int) -> int:
        """The size of a value at path `place`, behind `chain` references."""
        if isinstance(value, Mapping):
            parts = [(str(key), part) for key, part in value.items()]
        elif isinstance(value, list):
            parts = [(str(index), part) for index, part in enumerate(value)]
        else:
            return self._text_size(value, place, chain) if isinstance(value, str) else 1
        return self._bounded(1 + sum(self.size(part, (*place, key), chain) for key, part in parts), place)

    def _text_size(self, text: str, place: KeyPath, chain: int) -> int:
        if "${" not in text:
            return len(text)
        where = ".".join(place)
        if chain >= MAX_CHAIN:
            raise ValueError(f"{where}: more than {MAX_CHAIN} references from one to the next")
        targets = [self._target(dots, path, place) for dots, path in _REFERENCE.findall(text)]
        return self._bounded(len(text) + sum(self._target_size(target, chain) for target in targets), place)

    def _target_size(self, target: KeyPath, chain: int) -> int:
        if target not in self.known:
            self.known[target] = self.size(_at(self.tree, target), target, chain + 1)
        return self.known[target]

    @staticmethod
    def _target(dots: str, path: str, place: KeyPath) -> KeyPath:
        words = tuple(re.findall(r"[\w-]+", path))
        return (*place[: max(0, len(place) - len(dots))], *words) if dots else words

    @staticmethod
    def _bounded(size: int, place: KeyPath) -> int:
        if size > MAX_EXPANDED:
            raise ValueError(f"{'.'.join(place) or 'the config'}: references that grow to more than {MAX_EXPANDED:,}")
        return size


def _at(tree: Any, place: Sequence[str]) -> Any:
    """The value at a path; None where there is none, which OmegaConf reports."""
    for key in place:
        if isinstance(tree, Mapping):
            tree = tree.get(key, tree.get(int(key)) if key.isdecimal() and len(key) < MAX_CHAIN else None)
        elif isinstance(tree, list) and key.isdecimal() and len(key) < MAX_CHAIN and int(key) < len(tree):
            tree = tree[int(key)]
        else:
            return None
    return tree
