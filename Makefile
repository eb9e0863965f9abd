# Set up, run, test. `make quickstart` and `make test` need nothing but Python 3.11 or newer.
PYTHON ?= python3
# Which locked versions: cpu, or gpu for torch with CUDA.
DEVICE ?= cpu
VENV := .venv
BIN := $(VENV)/bin
LOCKS := configs/requirements
UV_VERSION := 0.13.9
TORCH := 2.13.0
# What `make test-transformers` tries: the lowest release, one between and the highest; and with which tests.
TRANSFORMERS ?= 5.16 5.20 5.24
CALLS_MODELS ?= tests/workers/runtime tests/workers/models tests/workers/evaluation/shared
# Wheels that pip is set up to find on disk are found by uv too; without any, uv takes torch's build for the device.
FIND_LINKS := $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null || echo "$$PIP_FIND_LINKS")
# Modules are compiled once: the test run and Ray start dozens of processes that import torch and transformers.
export PYTHONDONTWRITEBYTECODE :=
UV := $(if $(FIND_LINKS),UV_FIND_LINKS=$(FIND_LINKS),$(if $(filter cpu,$(DEVICE)),UV_TORCH_BACKEND=cpu)) $(BIN)/uv pip

.PHONY: install install-test lock quickstart test test-transformers gpu lint format docs fields clean

install: $(VENV)/.installed

install-test: $(VENV)/.installed-test

# --no-deps: the lock file names every package, and the CPU's leaves torch's CUDA packages out.
$(VENV)/.installed: pyproject.toml $(LOCKS)/$(DEVICE).txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check uv==$(UV_VERSION)
	$(UV) install --quiet --python $(BIN)/python --no-deps -r $(LOCKS)/$(DEVICE).txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed $(LOCKS)/test.txt
	$(UV) install --quiet --python $(BIN)/python --no-deps -r $(LOCKS)/test.txt
	touch $@

# Take the newest versions that pyproject.toml allows into the lock files.
lock: install
	echo 'torch==$(TORCH)' > $(VENV)/torch.txt
	$(BIN)/uv pip compile --quiet --upgrade -c $(VENV)/torch.txt --universal --python-version 3.11 --no-header --no-annotate pyproject.toml -o $(LOCKS)/gpu.txt
	grep -vE '^(nvidia|cuda|triton)' $(LOCKS)/gpu.txt > $(LOCKS)/cpu.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --extra test -c $(LOCKS)/gpu.txt pyproject.toml \
	  | grep -vxFf $(LOCKS)/gpu.txt > $(LOCKS)/test.txt

quickstart:
	@mkdir -p $(VENV) && date +%s > $(VENV)/times
	@$(MAKE) --no-print-directory install
	@date +%s >> $(VENV)/times
	$(BIN)/skipplan run configs/quickstart.yaml
	@date +%s >> $(VENV)/times
	$(BIN)/skipplan best --model llava-12 --task easy-vqa --max-accuracy-drop 0.01
	$(BIN)/skipplan export --model llava-12 --task easy-vqa --max-accuracy-drop 0.01 --format checkpoint --output exports/quickstart --force
	@set -- $$(cat $(VENV)/times) && echo "installation $$(($$2 - $$1)) s, job $$(($$3 - $$2)) s"

test: install-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The model families and all else that calls models, on other releases of transformers: an environment for each of them,
# with the locked versions but for what its release asks for. Five minutes of processor time each without `slow`.
test-transformers: $(TRANSFORMERS:%=$(VENV)/transformers-%/.installed)
	for release in $(TRANSFORMERS); do \
	  $(VENV)/transformers-$$release/bin/python -m pytest -n 2 -m 'slow or not slow' $(CALLS_MODELS) || exit 1; \
	done

$(VENV)/transformers-%/.installed: $(VENV)/.installed-test
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(@D)
	$(UV) install --quiet --python $(@D)/bin/python --no-deps -r $(LOCKS)/$(DEVICE).txt -r $(LOCKS)/test.txt -e .
	$(UV) install --quiet --python $(@D)/bin/python 'transformers==$*.*'
	touch $@

# On a machine with a GPU, installed with DEVICE=gpu: what tests on a CPU cannot check, and measurements.
gpu: install-test
	PYTHONPATH=.:tests/helpers:tests/benchmarks $(BIN)/python tests/benchmarks/gpu.py --page docs/benchmarks-gpu.md

lint: install-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: install-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fields: install
	$(BIN)/python docs/_site/field_table.py docs/jobs.md

clean:
	rm -rf $(VENV) exports site .mypy_cache .ruff_cache .import_linter_cache .hypothesis
