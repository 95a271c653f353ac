# A fresh machine needs only Python >= 3.10 and make: no compiler, no CUDA toolkit.
#
#   make venv    install the packages for training into .venv             about 2 min, mostly torch
#   make smoke   corpus -> tokenizer -> shards -> training -> perplexity -> sample   under 4 min, 2 cores
#   make dev     add the packages for tests, lint and docs
#   make test    run all tests                                                       under 30 min, 2 cores
#   make format  apply the formatter and the linter's safe fixes                     seconds
#   make check   check format, lint, types, house rules and language                 under 1 min
#   make docs    build the site of docs/ in site/                                    under 1 min

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
	$(BIN)/python -m pytest -q tests/unit/test_house.py tests/unit/test_language.py

format: dev
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

docs: dev
	$(BIN)/python -m mkdocs build --strict

venv: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "install   packages for training into $(VENV): torch takes minutes the first time"
	@$(INSTALL) .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "install   packages for tests, lint and docs into $(VENV)"
	@$(INSTALL) ".[dev]"
	@touch $@
