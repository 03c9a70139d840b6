# make demo: teach the bundled model the sample subject and draw it.  make test: the tests.  Neither needs a GPU or a hub.
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/installed
	$(BIN)/python dreambooth_implementation.py --train --model_name demo/model
	$(BIN)/python dreambooth_implementation.py --infer

test: .venv/installed-tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	$(BIN)/python -m pip install -q -r tests/requirements.txt
	$(BIN)/python -m pip install -q --no-deps open-clip-torch==3.3.0  # for CLIP's vocabulary alone, not its code
	touch $@

.PHONY: demo test
