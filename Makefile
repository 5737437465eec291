# make setup | check | test | e2e | demo | bench | golden | docs   (each prints what it runs)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DIR ?= demo

.PHONY: setup check test e2e demo bench golden docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[source,demo,engine,plot,test,dev]' && touch $@

check: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

test: setup
	$(BIN)/python -m pytest tests $(ARGS)

e2e: setup
	$(BIN)/python -m pytest tests/e2e -m e2e $(ARGS)

demo: setup
	$(BIN)/difyops demo $(DIR) $(if $(DIFY),--dify $(DIFY))

bench: setup
	$(BIN)/python tests/bench/deploy.py $(if $(DIFY),--dify $(DIFY))

golden: setup
	$(BIN)/python -m pytest tests/unit -q --update-golden

docs: setup
	$(BIN)/python -m difyops.reference docs

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
