# Set up, run, test. `make quickstart` and `make test` need nothing but Python 3.11 or newer.
PYTHON ?= python3
# CPU set-up; on a machine with a GPU: make install CONSTRAINTS=
CONSTRAINTS ?= configs/constraints-cpu.txt
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install quickstart test lint format docs fields clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml configs/constraints-cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[test]'
	touch $@

quickstart: install
	$(BIN)/skipplan run configs/quickstart.yaml
	$(BIN)/skipplan best --model llava-12 --task easy-vqa --max-accuracy-drop 0.01
	$(BIN)/skipplan export --model llava-12 --task easy-vqa --max-accuracy-drop 0.01 --format checkpoint --output exports/quickstart --force

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fields: install
	$(BIN)/python docs/_site/field_table.py docs/jobs.md

clean:
	rm -rf $(VENV) exports site .mypy_cache .ruff_cache .hypothesis
