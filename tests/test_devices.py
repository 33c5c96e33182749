"""How the libraries of a process are set: memory that is kept on a processor."""

import subprocess
import sys

from ldm.devices import keep_freed_memory

SCRIPT = """
import resource, sys, torch
from ldm.devices import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("unknown")
def step():
    for size in (1, 3, 9):
        torch.ones(size * 2**18)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_kept_memory_is_not_cleared_again():
    faults = {}
    for word in ("kept", "given back"):
        run = subprocess.run([sys.executable, "-c", SCRIPT, word], capture_output=True, text=True, check=False)
        if run.stderr.strip() == "unknown":
            assert not keep_freed_memory()
            return
        assert run.returncode == 0, run.stderr
        faults[word] = int(run.stdout)
    assert faults["kept"] < faults["given back"] / 10, faults
