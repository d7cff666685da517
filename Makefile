# make demo   the embedded model, end to end (under 3 minutes on 2 cores once installed)
# make test   everything continuous integration runs
# make soak   the property tests with twenty times the examples
# make bench  timings against other libraries, printed as ratios

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Nothing here may look for a model on the network; threads that spin waste a shared core.
export HF_HUB_OFFLINE = 1
export OMP_WAIT_POLICY = passive
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint types tests notebooks soak bench clean

demo: $(VENV)/.demo
	$(BIN)/mpo-tn demo --out demo --overwrite

test: lint types tests notebooks

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/pyright --pythonpath $(BIN)/python

tests: $(VENV)/.test
	$(BIN)/python -m pytest -q

notebooks: $(VENV)/.test
	$(BIN)/python -m pytest -q --nbmake --nbmake-timeout=300 notebooks

soak: $(VENV)/.test
	HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest -q tests

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/decompose.py --large
	$(BIN)/python benchmarks/compress.py
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
