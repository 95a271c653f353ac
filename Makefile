# A fresh machine needs Python >= 3.10 and make, nothing else: no compiler, no CUDA toolkit.
#
#   make venv    install what training needs into .venv                            some 2 min, mostly torch
#   make smoke   corpus -> tokenizer -> shards -> training -> perplexity -> a sample   under 4 min, 2 cores
#   make dev     add what tests, lint and docs need
#   make test    the whole test suite                                            under 30 min, 2 cores
#   make format  apply the formatter and the linter's safe fixes                  seconds
#   make check   format, lint, types, house rules                                 under 1 min
#   make docs    the pages of docs/ as a site, in site/                            under 1 min

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable

.PHONY: smoke test check format docs venv dev

smoke: venv
	@$(BIN)/python -u launcher/smoke.py

test: dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup --ignore tests/slurm
	$(BIN)/python -m pytest tests/slurm

check: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m tests.sizes
	$(BIN)/python -m pytest -q tests/unit/test_house.py

format: dev
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

docs: dev
	$(BIN)/python -m mkdocs build --strict

venv: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "install   what training needs, into $(VENV): torch takes minutes the first time"
	@$(INSTALL) .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "install   what tests, lint and docs need, into $(VENV)"
	@$(INSTALL) ".[dev]"
	@touch $@
