# make demo   the embedded model, end to end (about 4 minutes on 2 cores once installed)
# make quick  lint, types and the tests that take under a second each (under 90 seconds on 2 cores once installed)
# make test   everything continuous integration runs
# make soak   the property tests with fifty times the examples, 6,000 damaged files, 30 kills of every command and kind of stream
# make architectures   what works with which model, tried on 80 tiny ones: docs/architectures.md
# make scale  what matrices cost to stream, the law, runs against it (some 15 minutes): docs/scale.md
# make bench  timings against other libraries, printed as ratios

PYTHON ?= python3
VENV ?= .venv
# Processes that share out the tests, of one thread each.
WORKERS ?= 2
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
# Nothing here may look for a model on the network; threads that spin waste a shared core.
export HF_HUB_OFFLINE = 1
export OMP_WAIT_POLICY = passive
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo quick test lint types fast tests soak architectures scale bench clean

demo: $(VENV)/.demo
	$(BIN)/mpo-tn demo --out demo --overwrite

quick: lint types fast

test: lint types tests

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/pyright --pythonpath $(BIN)/python

fast: $(VENV)/.test
	HYPOTHESIS_PROFILE=few $(PYTEST) -m "not slow" --durations=5 --durations-min=1

# With the notebooks, which begin, as one takes longest; their kernels do not see tests/conftest.py, which keeps other
# processes to one thread.
tests: export OMP_NUM_THREADS = 1
tests: $(VENV)/.test
	$(PYTEST) --nbmake --nbmake-timeout=300 notebooks tests mpo_tn

soak: export PYTHONPATH = tests
soak: $(VENV)/.test
	HYPOTHESIS_PROFILE=soak $(PYTEST) tests
	rm -rf build/soak
	OMP_NUM_THREADS=1 $(BIN)/python -m helpers.fuzz_load build/soak/load 6000
	OMP_NUM_THREADS=1 $(BIN)/python -m helpers.kill_commands build/soak/kills 30
	OMP_NUM_THREADS=1 $(BIN)/python -m helpers.kill_streams build/soak/streams 30

architectures: export PYTHONPATH = tests
architectures: export OMP_NUM_THREADS = 1
architectures: $(VENV)/.test
	$(BIN)/python -W ignore -m helpers.architecture_table run benchmarks/results/architectures.jsonl
	$(BIN)/python -m helpers.architecture_table page benchmarks/results/architectures.jsonl docs/architectures.md

# What is there is kept; the constants of mpo_tn/planning/effort.py are taken from what "scale.py law" prints.
scale: $(VENV)/.test
	$(BIN)/python benchmarks/scale.py run benchmarks/results/scale.jsonl
	$(BIN)/python benchmarks/scale.py page benchmarks/results/scale.jsonl docs/scale.md
	$(BIN)/python benchmarks/scale.py plot benchmarks/results/scale.jsonl docs/scale.svg

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/decompose.py --large
	$(BIN)/python benchmarks/low_rank.py --largest 4096
	$(BIN)/python benchmarks/compress.py
	$(BIN)/python benchmarks/products.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/bounds.py
	$(BIN)/python benchmarks/layers.py
	$(BIN)/python benchmarks/training.py

$(VENV)/.demo $(VENV)/.test $(VENV)/.bench: $(VENV)/.%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mpo-tn needs Python 3.11 or newer; name one with: make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .ruff_cache .hypothesis
