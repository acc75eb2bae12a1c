# Every target sets up what it needs, and reuses it the next time. Only python3 (3.11 or newer) is required.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# The environment with everything, if it exists. Otherwise, the demo and the docs install only what they need, which is
# much less. The site is built without importing onstep, so it needs none of its dependencies.
ALL = $(notdir $(wildcard $(VENV)/ready))
SITE = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
# One test per processor at a time. The slow tests that time something, or that use several processes, run one after another.
PARALLEL = -n logical --maxprocesses 8 --dist worksteal
QUICK = -m pytest -q -m "not slow" $(PARALLEL) $(PYTEST_FLAGS)
ALONE = $(addprefix tests/test_,benchmarks.py examples_distributed.py graceful_exit.py processes.py)
# Tests of code that depends on other packages.
DEPENDENT = checkpoint config events histograms images learning_rate metrics state summary swa tensorboard

.PHONY: demo test test-slow test-all lint types coverage dist wheel lowest newest docs bench clean

demo: $(VENV)/$(or $(ALL),ready-demo)  ## the main example: train on real data with all callbacks of a typical run
	$(RUN) examples/digits.py

test: $(VENV)/ready  ## the tests to run while you work; a few minutes
	$(RUN) $(QUICK)

coverage: $(VENV)/ready  ## the same with coverage; pyproject.toml sets the minimum
	$(RUN) $(QUICK) --cov --cov-report=
	$(RUN) -m coverage report --skip-covered

test-slow: $(VENV)/ready  ## examples, documentation, kills, several processes, benchmarks
	$(RUN) -m pytest -q -m slow $(PARALLEL) $(PYTEST_FLAGS) $(addprefix --ignore=,$(ALONE))
	$(RUN) -m pytest -q -m slow $(PYTEST_FLAGS) $(ALONE)

test-all: lint types coverage test-slow dist lowest newest  ## everything that must pass before a change is merged

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

wheel: $(VENV)/ready
	rm -rf build dist && $(RUN) -m build . >/dev/null
	$(RUN) -m zipfile -e dist/onstep-*.whl build/wheel

types: wheel  ## type checks of the built wheel, which is what users import
	$(RUN) -m pyright --pythonpath $(RUN) --project tests/pyright.json
	PYTHONPATH=build/wheel $(RUN) .ci/typed.py

dist: wheel  ## check the files of a release, install the wheel alone and test it
	ONSTEP_DIST=dist $(RUN) -m pytest -q tests/test_release.py
	sh .ci/try-wheel $(PYTHON)

docs: $(VENV)/$(or $(ALL),ready-docs)  ## the documentation as a website: site/index.html
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

bench: $(VENV)/ready  ## the measurements of docs/performance.md; about half an hour
	$(RUN) benchmarks/overhead.py
	$(RUN) benchmarks/limits.py
	$(RUN) benchmarks/observers.py
	$(RUN) benchmarks/run.py --out benchmarks/results
	$(RUN) benchmarks/mesh.py --out benchmarks/results
	$(RUN) benchmarks/peers/run.py --json benchmarks/results/peers.json

lowest: .venv-lowest/ready  ## tests of dependent code with the lowest versions that pyproject.toml allows
	.venv-lowest/bin/python $(QUICK) $(DEPENDENT:%=tests/test_%.py)

newest:  ## all tests but those of the benchmarks on the newest Python of the machine, with the newest dependencies
	@python=$$(sh .ci/newest-python) || exit 0; \
	$(MAKE) test test-slow VENV=.venv-newest PYTHON="$$python" PYTEST_FLAGS="--compile-anew --deselect tests/test_benchmarks.py"

$(VENV)/ready: NEEDS = -e '.[dev]'
$(VENV)/ready-demo: NEEDS = -e '.[demo]'
$(VENV)/ready-docs: NEEDS = $$($(RUN) -c '$(SITE)')
$(VENV)/ready $(VENV)/ready-demo $(VENV)/ready-docs: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "onstep needs Python >= 3.11; choose one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(NEEDS)
	@touch $@

.venv-lowest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) .ci/lowest.py >.venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/lowest.txt \
		-e '.[config,examples]' hypothesis pytest pytest-xdist
	@touch $@

clean:
	rm -rf .venv .venv-lowest .venv-newest build dist runs site *.egg-info
