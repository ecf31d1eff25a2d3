# Needs Python >= 3.10 and make. uv, where it is on the PATH, installs in a fifth of pip's time.
PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin

# $(call install,WHAT); pip also takes over where uv cannot (an index in pip.conf, a cache it may not write).
define install
{ command -v uv >/dev/null && uv pip install --compile-bytecode --python $(BIN)/python -c constraints.txt -e '$(1)'; } \
|| $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '$(1)'
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test check lock clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## Quantize a small network on real images and validate it (runs/demo)
	$(BIN)/pow2quant ptq --output runs/demo --overwrite

test: $(VENV)/installed-dev ## Run the tests (WORKERS=2, PYTEST_ARGS='-k house')
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

check: $(VENV)/installed-dev ## Lint, check the format and the types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

lock: ## Pin constraints.txt anew from pyproject.toml (needs uv; UPGRADE=--upgrade takes newer versions)
	uv pip compile --universal --python-version 3.10 --all-extras --strip-extras --no-annotate --quiet $(UPGRADE) \
		--custom-compile-command "make lock  (the versions that CI tests; Python 3.10 to 3.13)" \
		pyproject.toml --output-file constraints.txt

clean: ## Remove the environment, caches, build products and runs/demo
	rm -rf $(VENV) build dist *.egg-info runs/demo
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find pow2quant tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/created:
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml constraints.txt
	$(call install,.)
	@touch $@

$(VENV)/installed-dev: $(VENV)/created pyproject.toml constraints.txt
	$(call install,.[dev])
	@touch $(VENV)/installed $@
