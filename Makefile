# A fresh machine needs Python >= 3.10 and make, nothing else: no compiler, no CUDA toolkit.
#
#   make smoke   corpus -> tokenizer -> shards -> training -> perplexity -> a sample   6 min, 2 cores
#   make test    the whole test suite                                            under 30 min, 2 cores
#   make check   format, lint, types, house rules                                 under 1 min
#   make docs    the pages of docs/ as a site, in site/                            under 1 min

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: smoke test check docs venv

smoke: venv
	@$(BIN)/python -u launcher/smoke.py

test: venv
	$(BIN)/python -m pytest -n 2 --dist loadgroup --ignore tests/slurm
	$(BIN)/python -m pytest tests/slurm

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_house.py

docs: venv
	$(BIN)/python -m mkdocs build --strict

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (minutes the first time, for torch)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@
