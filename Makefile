# Each target does its own set-up; a second time it is quick. Needs python3 (3.11 or newer) and nothing else.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test test-slow test-all lint types bench newest clean

demo: $(VENV)/ready  ## the main job: train on real data with every callback attached
	$(RUN) examples/digits.py

test: $(VENV)/ready  ## what a contributor runs, in a few minutes
	$(RUN) -m pytest -q -m "not slow"

test-slow: $(VENV)/ready  ## the examples and the documents, run as a user would
	$(RUN) -m pytest -q -m slow

test-all: lint types test test-slow newest  ## everything that must hold before a change lands

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/ready  ## against the built wheel, which is what users import
	rm -rf build && $(RUN) -m build --wheel --outdir build . >/dev/null
	$(RUN) -m zipfile -e build/onstep-*.whl build/wheel
	$(RUN) -m pyright --pythonpath $(RUN) --project tests/pyright.json

bench: $(VENV)/ready  ## the numbers of docs/performance.md; about half an hour
	$(RUN) benchmarks/overhead.py
	$(RUN) benchmarks/limits.py
	$(RUN) benchmarks/run.py --out benchmarks/results
	$(RUN) benchmarks/peers/run.py --json benchmarks/results/peers.json

newest:  ## the same tests on the newest Python of the machine, with the newest dependencies
	@python=$$(sh .ci/newest-python) || exit 0; \
	$(MAKE) test test-slow VENV=.venv-newest PYTHON="$$python"

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "onstep needs Python >= 3.11; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .venv-newest build dist runs *.egg-info
