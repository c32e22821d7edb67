# The menu: `make help` prints it. CI runs these targets and nothing else.

.DEFAULT_GOAL := help
SHELL := bash
VENV := .venv
BIN := $(VENV)/bin

# The first of these that is at least 3.11; PYTHON=... names another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# uv installs torch by hard link; where it is missing the environment gets its own.
UV = $(if $(shell uv --version 2>/dev/null),uv,$(BIN)/uv)

# The versions of transformers that are tested beside the newest, each in an environment of its own.
OLDEST := 4.57.6
VERSIONS := $(OLDEST) 5.18.0
# What of the tests depends on it.
MODEL_TESTS := tests/model tests/cache/test_measured.py tests/test_layout.py
# Of these on every change: not what takes long and asks little of the version.
QUICK_TESTS = $(filter-out $(addprefix tests/model/test_,attention.py call_fuzz.py reproducible.py \
	triton.py triton_build.py), \
	$(wildcard tests/model/test_*.py)) $(filter-out tests/model,$(MODEL_TESTS))
ENV_OF = .venv-transformers-$(1)
WITH = PYTHONPATH=python $(call ENV_OF,$(1))/bin/python

RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml)
CARGO := PYO3_PYTHON=$(CURDIR)/$(BIN)/python cargo

# What .venv holds beside the package. With the oldest dependencies (UV_RESOLUTION=lowest-direct) it is `dev` alone:
# what the examples' clients depend on in turn asks for a newer transformers than the package does.
DEPENDENCY_GROUPS ?= dev examples

.PHONY: help env demo examples test test-rust test-python test-oldest test-transformers lint format bench cuda-kernels build clean

help: ## show this menu
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(VENV)/.built ## create .venv with everything in it, and build the extension
	@true

demo: env ## several sessions on the embedded model: time to first token with and without reuse
	$(BIN)/kvhybrid demo

examples: env ## every program of examples/ on the embedded model, and what each saves
	for program in $$(grep -l __main__ examples/*.py); do HF_HUB_OFFLINE=1 $(BIN)/python $$program || exit 1; done

test: test-rust test-python ## all tests

test-rust: $(VENV)/.installed
	$(CARGO) test --workspace --locked

test-python: env
	$(BIN)/python -m pytest

test-oldest: env $(call ENV_OF,$(OLDEST))/.installed ## the tests of models on the oldest transformers that is served
	$(call WITH,$(OLDEST)) -m pytest $(QUICK_TESTS)

test-transformers: env $(foreach version,$(VERSIONS),$(call ENV_OF,$(version))/.installed) ## the same on every version, and docs/compatibility.md
	$(foreach version,$(VERSIONS),$(call WITH,$(version)) -m pytest $(MODEL_TESTS) &&) true
	$(BIN)/python -m pytest $(MODEL_TESTS)
	@mkdir -p target/compatibility
	$(foreach version,$(VERSIONS),$(call WITH,$(version)) tests/compatibility.py --json target/compatibility/$(version).json &&) true
	$(BIN)/python tests/compatibility.py --json target/compatibility/newest.json
	$(BIN)/python tests/compatibility.py --table $(VERSIONS:%=target/compatibility/%.json) target/compatibility/newest.json \
		| tee docs/compatibility.md

lint: env ## formatting, lints, types, the extension's stub, the workflow files
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --mypy-config-file pyproject.toml kvhybrid._core
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	cargo fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

format: $(VENV)/.installed ## rewrite what lint would complain about
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	cargo fmt --all

bench: env ## every measurement of the README, in full; prints its table
	$(BIN)/python benches/table.py

cuda-kernels: env ## registers and spills of the CUDA kernels, compiled without a GPU, and docs/cuda-kernels.md
	$(BIN)/python benches/peers/triton_build.py --markdown docs/cuda-kernels.md

build: $(VENV)/.installed ## the wheel, into dist/
	$(BIN)/maturin build --release --out dist --interpreter $(BIN)/python

clean: ## remove whatever these targets made
	rm -rf $(VENV) $(foreach version,$(VERSIONS),$(call ENV_OF,$(version))) target dist .mypy_cache .ruff_cache .pytest_cache .hypothesis benches/.asv
	find python tests benches examples scripts -name __pycache__ -prune -exec rm -rf {} +
	rm -f python/kvhybrid/_core*.so python/kvhybrid/_core*.pyd

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	test "$(UV)" = uv || $(BIN)/python -m pip install --quiet uv
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(UV) pip install --quiet --python $(BIN)/python --requirements pyproject.toml --extra plot $(DEPENDENCY_GROUPS:%=--group %)
	@touch $@

.venv-transformers-%/.installed: $(VENV)/.created pyproject.toml
	$(UV) venv --quiet --clear --python $(BIN)/python .venv-transformers-$*
	$(UV) pip install --quiet --python .venv-transformers-$*/bin/python --requirements pyproject.toml \
		--extra transformers --group test "transformers==$*"
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(RUST_SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" VIRTUAL_ENV="$(CURDIR)/$(VENV)" maturin develop --uv --release
	@touch $@
