"""Time, memory and work of our networks beside others', in one run; `scripts/dev/benchmark.py` is the command."""
