PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROCESSES ?= 2
STAMP := $(VENV)/.installed

.PHONY: finetune test check bench docs wheel clean

finetune: $(STAMP)  ## fine-tune the embedded model on private docstrings, offline
	$(BIN)/dpopt finetune

# One thread each: two processes on two cores took a third of the time of one process with two threads.
test: check  ## lint, types and the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(STAMP)  ## private against non-private step, peers beside it (slow)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks.step

docs: $(STAMP)  ## the documentation, as a folder that opens without a server: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

wheel: $(STAMP)  ## what is published, in dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[hf,dev]"
	touch $@

clean:
	rm -rf $(VENV)
