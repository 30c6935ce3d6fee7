.PHONY: setup demo test chaos lint lock clean
PYTHON ?= python3
BIN := .venv/bin

setup: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml client/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable . --editable client
	touch $@

demo: setup
	$(BIN)/bulk-submit demo

test: setup
	$(BIN)/pytest -q -m "not chaos"

chaos: setup
	$(BIN)/pytest -q tests/chaos
	$(BIN)/bulk-submit drill random --events 200 --resources 1000000 --minutes 10

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	POSTGRES_PASSWORD=- BULK_SUBMIT_SEALING_KEYS=- FLOWER_BASIC_AUTH=- \
	  $(BIN)/docker-compose --file docker-compose.yml config --quiet
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/hadolint Dockerfile

COMPILE := $(BIN)/uv pip compile pyproject.toml client/pyproject.toml --universal --python-version 3.11 \
  --generate-hashes --no-emit-package bulk-submit-client --no-annotate --no-header --quiet

lock: setup
	$(BIN)/python -m pip install --quiet uv
	$(COMPILE) --all-extras --group pyproject.toml:dev --output-file requirements.lock
	$(COMPILE) --constraint requirements.lock --output-file requirements-runtime.lock

clean:
	rm -rf .venv build dist *.egg-info client/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
