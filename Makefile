# Two commands for a newcomer: `make demo` and `make test`. Both set up everything they need.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/uv pip install --quiet --compile-bytecode --constraint constraints.txt

.PHONY: demo dashboard test faults notebooks clean

demo: .venv/installed  ## a year of real flights, from definition to money
	$(BIN)/aiexec demo demo

dashboard: .venv/installed  ## look at the demo's dashboards
	$(BIN)/aiexec dashboard --project demo

test: .venv/installed-dev  ## everything that must hold
	$(BIN)/python -m pytest

faults: .venv/installed-dev  ## every fault on runs, in hours; goes on where it stopped: make faults FAULTS="--only syscalls --minutes 20"
	$(BIN)/python -m tests.faults $(FAULTS)

notebooks: .venv/installed-dev  ## after editing notebooks: library, metadata, README
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean && $(BIN)/nbdev-clean --fname templates && $(BIN)/python tests/generated.py --write

.venv/uv:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'aiexec needs Python 3.11 or newer: make PYTHON=python3.11 …')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	touch $@

.venv/installed: .venv/uv settings.ini setup.py pyproject.toml constraints.txt
	$(INSTALL) --editable '.[examples,dashboard,lab]'
	touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) --editable '.[all,dev]'
	touch $@

clean:
	rm -rf .venv build dist demo *.egg-info
