# `make smoke` shows the whole job on a CPU; `make test` runs the tests. Both set everything up on a fresh clone.

# Any CPython 3.11 or 3.12; `make PYTHON=/path/to/python smoke` chooses another one.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
# The torch to install, with any pip options it needs: see "Choosing a torch" in the README.
TORCH ?= torch==2.13.0
PIP_ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install smoke test test-long chaos bench bench-gpu bench-gpu-full tiny-world proof lint format

install: $(INSTALLED)

# torch first and alone, so that no other package chooses it. DS_BUILD_OPS=0: no compiler is needed.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(PIP_ARGS) '$(TORCH)'
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(INSTALLED)

smoke: $(INSTALLED)
	$(BIN)/python scripts/smoke.py

# One thread per process, two test files at a time: the tests start many processes of their own.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(INSTALLED)
	$(PYTEST) -m 'not long'

test-long: $(INSTALLED)
	$(PYTEST) -m long

# Ratios within one run; each reports to reports/bench_<name>/. A target that is missed does not keep the others from running.
BENCH := OMP_NUM_THREADS=1 $(BIN)/python

bench: $(INSTALLED)
	-$(BENCH) scripts/bench/pipeline.py
	-$(BENCH) scripts/bench/data.py
	-$(BENCH) scripts/bench/probes.py
	-$(BENCH) -m scripts.bench.dit_block
	-$(BENCH) -m scripts.bench.encoder
	-$(BENCH) -m scripts.bench.vae
	-$(BENCH) -m scripts.bench.sampling
	-$(BENCH) -m scripts.bench.train_step
	-$(BENCH) -m scripts.bench.e2e

# The rows that have a target, on one GPU, with random weights: nothing is downloaded. bench-gpu-full: the whole grid.
bench-gpu: $(INSTALLED)
	-$(BENCH) -m scripts.bench.dit_block --device cuda --compile --only block --rounds 5
	-$(BENCH) -m scripts.bench.train_step --device cuda

bench-gpu-full: $(INSTALLED)
	-$(BENCH) scripts/bench/pipeline.py --device cuda
	-$(BENCH) -m scripts.bench.dit_block --device cuda
	-$(BENCH) -m scripts.bench.dit_block --device cuda --compile
	-$(BENCH) -m scripts.bench.encoder --device cuda
	-$(BENCH) -m scripts.bench.vae --device cuda
	-$(BENCH) -m scripts.bench.sampling --device cuda
	-$(BENCH) -m scripts.bench.train_step --device cuda --full
	-$(BENCH) -m scripts.bench.e2e

# 25 runs killed with SIGKILL, most of them inside a save, and resumed.
chaos: $(INSTALLED)
	$(BIN)/python scripts/chaos.py

# The trained tiny Wan of tests/assets/tiny_wan/, from nothing: docs/tiny_world.md. One thread, whatever the machine has.
tiny-world: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.tiny_world.build

# Trains, draws and judges every arm of docs/proof.md; goes on where it was interrupted. Two arms at a time, one core each.
proof: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.tiny_world.proof

lint: $(INSTALLED)
	$(BIN)/black --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/black --quiet .
	$(BIN)/ruff check --fix .
