"""The switches that save memory, alone over twenty steps and every two of them together."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import pytest
import torch

from ldm.errors import UserError
from tests.conftest import relative_error
from tests.memory_runs import NEEDS_BF16, SWITCHES, Result, train, words_of

# These change what is computed; all others must not.
CHANGING = {"bfloat16 weights", "split weights", "8 bits", "4 bits", "average in bfloat16"}
SAME = [switch for switch in SWITCHES if switch not in CHANGING]
ONE_WORD = [{"bfloat16 weights", "split weights"}, {"8 bits", "4 bits"}, {"checkpoints", "first checkpoints"}]
CHECKPOINTS = {"checkpoints", "first checkpoints"}
PAIRS = [pair for pair in combinations(SWITCHES, 2) if set(pair) not in ONE_WORD]


@cache
def plain(switches: tuple[str, ...], steps: int, bf16: bool) -> Result:
    return train(*switches, steps=steps, bf16=bf16)


def assert_alike(found: Result, expected: Result) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    for tensors, others in ((found.weights, expected.weights), (found.averages, expected.averages)):
        assert tensors.keys() == others.keys()
        for name, other in others.items():
            assert relative_error(tensors[name], other) <= 1e-6, name


def with_checkpoints(*switches: str) -> tuple[str, ...]:
    needs = "inputs on host" in switches and not CHECKPOINTS & set(switches)
    return (*switches, "checkpoints") if needs else switches


@pytest.mark.slow
@pytest.mark.parametrize("switch", SAME)
def test_twenty_steps_are_those_of_the_plain_run(switch):
    """Bit by bit here; other processors may sum in another order."""
    bf16 = switch in NEEDS_BF16
    assert_alike(train(*with_checkpoints(switch), steps=20, bf16=bf16), plain((), 20, bf16))


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_every_two_switches_together(pair):
    bf16 = bool(NEEDS_BF16 & set(pair))
    if "inputs on host" in pair and not CHECKPOINTS & set(pair):
        with pytest.raises(UserError, match=r"inputs_on_host.*use_checkpoint"):
            train(*pair, steps=1, bf16=bf16)
    found = train(*with_checkpoints(*pair), steps=2, bf16=bf16)
    assert all(map(torch.isfinite, map(torch.tensor, found.losses)))
    assert_alike(found, plain(tuple(switch for switch in pair if switch in CHANGING), 2, bf16))
    start = plain((), 0, bf16)
    assert all(relative_error(value, start.weights[name]) > 1e-4 for name, value in found.weights.items())


def test_no_two_switches_share_a_word():
    for pair in PAIRS:
        assert sum(len(words) for words in words_of(*pair).values()) == 2, pair
