# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LINKS := surgery/grammar surgery/passes surgery/backends
# twice quiet: errors only
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint generate build clean

demo: $(VENV)/.demo
	HF_HUB_OFFLINE=1 $(BIN)/surgery compile specs/quickstart.surg --force
	HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py build

test: lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --durations 15

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m surgery.dev generate --check

generate: $(VENV)/.dev
	$(BIN)/python -m surgery.dev generate

build: $(VENV)/.dev
	$(BIN)/python -m build --no-isolation

# archives of the sources come without the links that show the three top folders as sub-packages
$(LINKS):
	ln -s ../$(notdir $@) $@

# torch first, by itself: the pinned CPU build keeps pip from choosing a release that brings gigabytes of CUDA packages
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml | $(LINKS)
	$(PIP) --editable ".[onnx,demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable ".[onnx,demo,train,peft,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
