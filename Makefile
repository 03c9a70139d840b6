# make demo: teach the bundled model the sample subject and draw it.  make test: the tests.  make test-all: the long ones as well.
# Neither needs a GPU or a hub.  make single: dreambooth_implementation.py anew from the modules in dreambooth/.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests

demo: .venv/installed
	$(BIN)/python dreambooth_implementation.py --train --model_name demo/model
	$(BIN)/python dreambooth_implementation.py --infer

test: .venv/installed-tests
	$(PYTEST) -m "not slow"

test-all: .venv/installed-tests
	$(PYTEST)

single:
	$(PYTHON) tools/single_file.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	$(BIN)/python -m pip install -q -r tests/requirements.txt
	$(BIN)/python -m pip install -q --no-deps open-clip-torch==3.3.0  # for CLIP's vocabulary alone, not its code
	touch $@

.PHONY: demo test test-all single
