PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: setup test test-fast lint demo demo-train clean

setup: $(READY)

# Install torch first, by its exact pin; then the rest under constraints.txt, which excludes torchvision; last
# open_clip_torch without its dependencies: only its CLIP vocabulary file is read, it is never imported.
$(READY): setup.py constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "torch==2.13.0"
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(PY) -m pip install --quiet --no-deps "open_clip_torch==3.3.0"
	touch $(READY)

PYTEST := $(PY) -m pytest tests -n 2 --dist loadfile

# Two test files run at a time, one thread per test. Numeric tests also run with the kernels of CPUs without AVX-512 and
# without any vector extension: their tolerances must hold on all of them.
test: $(READY)
	$(PY) -m ruff check .
	ATEN_CPU_CAPABILITY=default $(PYTEST) -m numeric
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m numeric
	$(PYTEST)

# All tests but those marked slow: about two minutes on two cores.
test-fast: $(READY)
	$(PY) -m ruff check .
	$(PYTEST) -m "not slow"

lint: $(READY)
	$(PY) -m ruff check .

demo: $(READY)
	$(PY) scripts/demo.py

demo-train: $(READY)
	$(PY) scripts/demo.py --train

clean:
	rm -rf $(VENV) build *.egg-info
