PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: setup test lint demo demo-train clean

setup: $(READY)

# torch first and by its exact pin; then the rest under constraints.txt, which refuses torchvision; last
# open_clip_torch without its dependencies: only its CLIP vocabulary file is read, it is never imported.
$(READY): setup.py constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "torch==2.13.0"
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(PY) -m pip install --quiet --no-deps "open_clip_torch==3.3.0"
	touch $(READY)

# Two files of tests side by side; each test computes with one thread.
test: $(READY)
	$(PY) -m ruff check .
	$(PY) -m pytest tests -n 2 --dist loadfile

lint: $(READY)
	$(PY) -m ruff check .

demo: $(READY)
	$(PY) scripts/demo.py

demo-train: $(READY)
	$(PY) scripts/demo.py --train

clean:
	rm -rf $(VENV) build *.egg-info
