# Two commands set up everything on a fresh machine (Python >= 3.11 and make): `make quickstart` and `make test`.

VENV := .venv
BIN := $(VENV)/bin
# the first interpreter that is new enough (a pyenv shim may exist and still refuse to run)
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: quickstart test test-parity test-vllm lint clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed  ## SOUL.md to data, model, evals and report (ARGS="--soul MY.md" for your own)
	$(BIN)/soulsmith quickstart $(ARGS)

test: $(VENV)/.installed-dev  ## the whole suite, hermetic
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-parity: $(VENV)/.installed-dev  ## against transformers, TRL and torch
	$(PIP) install -r requirements-parity.txt
	$(BIN)/python -m pytest tests/model/test_parity.py tests/training/test_trl_parity.py -rs $(ARGS)

test-vllm: $(VENV)/.installed-dev  ## against a real vLLM: VLLM_PYTHON=PATH of an environment that has it
	VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python -m pytest tests/vllm -rs -s $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "soulsmith needs Python 3.11 or newer; install it, or say make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created requirements.txt pyproject.toml
	@echo "installing pinned requirements into $(VENV) (about a minute, 1.2 GB)"
	$(PIP) install -r requirements.txt
	@$(PIP) install --no-deps -e . > $(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; exit 1; }
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PIP) install -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
