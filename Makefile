# Two commands are all a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

export HF_HUB_OFFLINE = 1
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test test-slow test-newest test-lowest lint style types format docs docs-models clean

setup: $(READY)

$(READY): pyproject.toml requirements.lock
	@echo "Setting up $(VENV) (a few minutes the first time)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "silotune needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[demo,dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/silotune demo hospitals ./hospitals --force
	$(BIN)/silotune simulate ./hospitals/plan.toml --baselines

# Two processes of about the same length, one a core; types and imports are looked at beside them.
HALF := tests/client tests/commands tests/dashboard tests/e2e tests/events tests/flower tests/models \
	tests/privacy tests/server tests/strategies tests/test_export.py
PYTEST = $(BIN)/python -m pytest --durations=10 -o tmp_path_retention_count=1
# Files of tests are in memory where there is room: a process that is killed needs no disk to lose nothing.
ROOM := $(shell [ "$$(df -k --output=avail /dev/shm 2> /dev/null | tail -n 1)" -gt 4000000 ] 2> /dev/null && echo /dev/shm)

TYPES = $(BIN)/mypy && $(BIN)/lint-imports --no-logo

test: export PYTEST_DEBUG_TEMPROOT = $(ROOM)
test: style
	@log=$$(mktemp -d); $(PYTEST) $(HALF) > $$log/half 2>&1 & half=$$!; \
	($(TYPES)) > $$log/types 2>&1 & types=$$!; \
	$(PYTEST) $(HALF:%=--ignore=%); status=$$?; \
	wait $$half || status=1; wait $$types || status=1; cat $$log/half $$log/types; rm -rf $$log; exit $$status

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# What depends on other libraries' insides, with the newest and the lowest versions that pyproject.toml admits.
ENDS := tests/client/test_admission.py tests/client/test_trainer.py tests/flower tests/models tests/planted \
	tests/privacy/test_accounting.py tests/privacy/test_clipping.py tests/privacy/test_engine.py tests/protocol \
	tests/server/store/test_store.py tests/server/test_run_control.py tests/simulation/test_grid.py \
	tests/simulation/test_ray_engine.py tests/simulation/test_run.py tests/strategies tests/trust
INSTALL = $(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)-$(1) && \
	$(BIN)/uv pip install --quiet --python $(VENV)-$(1)/bin/python -e '.[demo,dev]' --resolution

test-newest: $(READY)
	$(call INSTALL,newest) highest
	$(VENV)-newest/bin/python -m pytest $(ENDS)

test-lowest: $(READY)
	$(call INSTALL,lowest) lowest-direct
	$(VENV)-lowest/bin/python tests/lowest_bounds.py
	$(VENV)-lowest/bin/python -m pytest $(ENDS)

lint: style types

style: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(TYPES)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)
	$(BIN)/silotune errors --markdown > docs/errors.md

# Builds and trains every architecture: some ten minutes.
docs-models: $(READY)
	page=$$(mktemp) && $(BIN)/python -m tests.models.catalogue > $$page && mv $$page docs/models.md

clean:
	rm -rf $(VENV) .import_linter_cache $(VENV)-newest $(VENV)-lowest .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
