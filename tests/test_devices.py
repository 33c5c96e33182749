"""Memory that a process keeps on a CPU."""

import os
import subprocess
import sys

import pytest

from ldm.devices import keep_freed_memory

SCRIPT = """
import resource, sys, torch
from ldm.devices import keep_freed_memory
print(keep_freed_memory())
def step():
    held = [torch.ones(2**18) for _ in range(60)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # every block is a mapping of its own
PAGES = 5 * 60 * 2**20 // 4096


def faults(environment: dict[str, str]) -> tuple[bool, int]:
    """In a new process: whether memory is kept, and the page faults of five steps of 60 MiB."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=others | environment
    )
    is_kept, number = run.stdout.split()
    return is_kept == "True", int(number)


def test_kept_memory_is_not_cleared_again():
    is_kept, number = faults({})
    if not is_kept:
        pytest.skip("another C library than glibc")
    assert number < PAGES / 20


def test_allocator_settings_of_the_environment_take_precedence(monkeypatch):
    is_kept, number = faults(GIVEN_BACK)
    assert not is_kept and number > PAGES / 20
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    assert not keep_freed_memory()
