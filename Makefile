# Needs Python >= 3.10 and make. uv, where it is on the PATH, installs in a fifth of pip's time.
PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
ARGS ?=
BENCH ?= families
# CPU=1 installs PyTorch without CUDA, 5.9 GB less, where this index can be reached; elsewhere the usual one is taken.
CPU ?=
CPU_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' pow2quant/__init__.py)
# The engines whose `info` works; docker's client is often there without its daemon.
ENGINE ?= $(firstword $(foreach engine,docker podman buildah,$(shell $(engine) info >/dev/null 2>&1 && echo $(engine))))

# Asked once: pip would try an index that cannot be reached five times for every package.
ask = from urllib.request import urlopen; urlopen('$(CPU_INDEX)/torch/', timeout=10)
cpu_index = $(if $(CPU),$(shell $(PYTHON) -c "$(ask)" 2>/dev/null && echo $(CPU_INDEX) \
	|| echo "$(CPU_INDEX) cannot be reached: installing the usual PyTorch" >&2))

# $(call install,WHAT,INDEX); pip also takes over where uv cannot (an index in pip.conf, a cache it may not write).
define install
{ command -v uv >/dev/null && uv pip install --compile-bytecode --python $(BIN)/python -c constraints.txt \
	$(if $(2),--torch-backend cpu) -e '$(1)'; } \
|| $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt \
	$(if $(2),--extra-index-url $(2)) -e '$(1)'
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo shell test check sbom dist ptq ptq-aimet qat qat-full qat-aimet bench docs gallery docker lock clean clean-data

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## Quantize a small network on real images and validate it (runs/demo; CPU=1: without CUDA)
	OMP_NUM_THREADS=1 $(BIN)/pow2quant ptq --output runs/demo --overwrite
	@echo "next: . $(BIN)/activate (or: make shell), then: pow2quant --help"

shell: $(VENV)/installed ## A shell in which pow2quant is on the PATH (the same: . .venv/bin/activate)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $${SHELL:-/bin/sh}

test: $(VENV)/installed-dev ## Run the tests (WORKERS=2, PYTEST_ARGS='-k layers')
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

check: $(VENV)/installed-dev ## Lint, check the format, the types and known vulnerabilities
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python scripts/audit.py

sbom: $(VENV)/installed ## Write what is installed as CycloneDX (sbom.json)
	$(BIN)/python scripts/sbom.py > sbom.json

ptq: $(VENV)/installed ## Quantize as configs/quantization_config.yaml and ARGS say (ARGS='--weight-bits 4'; runs/ptq)
	$(BIN)/pow2quant ptq --config configs/quantization_config.yaml --output runs/ptq --overwrite $(ARGS)

ptq-aimet: $(VENV)/installed-aimet ## The same on AIMET's simulation (runs/ptq-aimet)
	$(BIN)/pow2quant ptq --config configs/quantization_config.yaml --backend aimet \
		--output runs/ptq-aimet --overwrite $(ARGS)

qat: $(VENV)/installed ## PTQ -> weight-only QAT -> final PTQ (ARGS='--epochs 5'; runs/qat)
	$(BIN)/pow2quant qat --output runs/qat --overwrite $(ARGS)

qat-full: $(VENV)/installed ## Train with everything quantized, for less than 8 bits (runs/qat-full)
	$(BIN)/pow2quant qat --mode full --output runs/qat-full --overwrite $(ARGS)

qat-aimet: $(VENV)/installed-aimet ## The three steps on AIMET's simulation (runs/qat-aimet)
	$(BIN)/pow2quant qat --backend aimet --output runs/qat-aimet --overwrite $(ARGS)

bench: $(VENV)/installed-aimet ## Run a benchmark that needs no data (BENCH=families; backends, cost, aimet_cost, speed)
	$(BIN)/python benchmarks/$(BENCH).py $(ARGS)

dist: $(VENV)/installed-dev ## Build source distribution and wheel; the wheel has the same bits for one commit (dist/)
	rm -rf build dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

docs: $(VENV)/installed-dev ## Build the documentation, warnings as errors (site/)
	$(BIN)/mkdocs build --strict

gallery: $(VENV)/installed-dev ## Build the gallery of the documentation, all of it or ARGS='widths vit' (docs/gallery/)
	OMP_NUM_THREADS=1 $(BIN)/python docs/gallery.py $(ARGS)

docker: ## Build the image pow2quant:VERSION (ENGINE=podman, ARGS='--build-arg EXTRAS=aimet')
	$(or $(ENGINE),$(error docker, podman or buildah has to be there and to work)) build $(ARGS) \
		--file docker/Dockerfile --tag pow2quant:$(VERSION) --tag pow2quant:latest .

lock: ## Pin constraints.txt anew from pyproject.toml (needs uv; UPGRADE=--upgrade takes newer versions)
	uv pip compile --universal --python-version 3.10 --all-extras --strip-extras --no-annotate --quiet $(UPGRADE) \
		--custom-compile-command "make lock  (the versions that CI tests; Python 3.10 to 3.13)" \
		pyproject.toml --output-file constraints.txt

clean: ## Remove the environment, caches and build products
	rm -rf $(VENV) build dist site *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find pow2quant tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-data: ## Remove the runs of the targets above, no others (data sets are yours: none is downloaded or cached)
	rm -rf $(addprefix runs/,demo ptq ptq-aimet qat qat-full qat-aimet)

# venv writes bin/activate last: an environment that has it is complete, scripts/create_env.sh's too.
$(VENV)/bin/activate:
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/installed: $(VENV)/bin/activate pyproject.toml constraints.txt
	$(call install,.,$(cpu_index))
	@touch $@

$(VENV)/installed-aimet: $(VENV)/bin/activate pyproject.toml constraints.txt
	$(call install,.[aimet],$(cpu_index))
	@touch $(VENV)/installed $@

$(VENV)/installed-dev: $(VENV)/bin/activate pyproject.toml constraints.txt
	$(call install,.[dev],$(cpu_index))
	@touch $(VENV)/installed $(VENV)/installed-aimet $@
