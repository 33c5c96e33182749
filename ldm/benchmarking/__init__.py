"""Time, memory and work of our networks beside others', in one run; `scripts/benchmark.py` is the command."""
