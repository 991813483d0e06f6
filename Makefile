# The CPU build where pip's index has one. PyPI's for Linux is that for CUDA, of gigabytes: set
# PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds to do without. TORCH=torch takes the newest.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-slow lint numbers clean
.DEFAULT_GOAL := test

setup: $(READY)

# Keyed on pyproject.toml: a second run finds the stamp and needs no network. The S3 server that
# tests start gets an environment of its own; where it cannot be made, those tests are skipped.
$(READY): pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	-$(BIN)/python tests/s3_server.py
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py demo-out

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

# Clusters, failing stores, killed drivers and workers: a minute or more each.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# What docs/model-card.md says that was measured: make numbers KODAK=folder of the 24 Kodak photos
numbers: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pillow-jxl-plugin
	$(BIN)/python benchmarks/complexity.py
	$(BIN)/python benchmarks/rate_distortion.py $(KODAK)

clean:
	rm -rf $(VENV) .venv-swift demo-out build dist .mypy_cache .ruff_cache .pytest_cache
