# Each target does its own set-up; a second time it is quick. Needs python3 (3.11 or newer) and nothing else.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# As many tests at a time as there are processors; those that start, kill or time processes run one by one.
BESIDE = -n logical --maxprocesses 8 --dist worksteal
QUICK = -m pytest -q -m "not slow" $(BESIDE) $(ANEW)
SCRIPTS = $(addprefix tests/test_,docs.py examples.py examples_generative.py examples_loops.py)
# What other packages have a say in.
LEANING = checkpoint config events histograms images learning_rate metrics state summary swa tensorboard

.PHONY: demo test test-slow test-all lint types coverage dist wheel lowest newest docs bench clean

demo: $(VENV)/ready  ## the main job: train on real data with every callback attached
	$(RUN) examples/digits.py

test: $(VENV)/ready  ## what a contributor runs, in a few minutes
	$(RUN) $(QUICK)

coverage: $(VENV)/ready  ## the same, and how much of the code it runs; pyproject.toml has the least
	$(RUN) $(QUICK) --cov --cov-report=
	$(RUN) -m coverage report --skip-covered

test-slow: $(VENV)/ready  ## the examples and the documents, run as a user would
	$(RUN) -m pytest -q -m slow $(BESIDE) $(ANEW) $(SCRIPTS)
	$(RUN) -m pytest -q -m slow $(ANEW) $(addprefix --ignore=,$(SCRIPTS))

test-all: lint types coverage test-slow dist lowest newest  ## everything that must hold before a change lands

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

wheel: $(VENV)/ready
	rm -rf build dist && $(RUN) -m build . >/dev/null
	$(RUN) -m zipfile -e dist/onstep-*.whl build/wheel

types: wheel  ## against the built wheel, which is what users import
	$(RUN) -m pyright --pythonpath $(RUN) --project tests/pyright.json
	PYTHONPATH=build/wheel $(RUN) .ci/typed.py

dist: wheel  ## what a release uploads: checked, installed alone, and tested as installed
	ONSTEP_DIST=dist $(RUN) -m pytest -q tests/test_release.py
	sh .ci/try-wheel $(PYTHON)

docs: $(VENV)/ready  ## the documents as pages: site/index.html
	$(RUN) -m mkdocs build --strict

bench: $(VENV)/ready  ## the numbers of docs/performance.md; about half an hour
	$(RUN) benchmarks/overhead.py
	$(RUN) benchmarks/limits.py
	$(RUN) benchmarks/run.py --out benchmarks/results
	$(RUN) benchmarks/mesh.py --out benchmarks/results
	$(RUN) benchmarks/peers/run.py --json benchmarks/results/peers.json

lowest: .venv-lowest/ready  ## what leans on other packages, with the lowest versions that pyproject.toml allows
	.venv-lowest/bin/python $(QUICK) $(LEANING:%=tests/test_%.py)

newest:  ## the same tests on the newest Python of the machine, with the newest dependencies
	@python=$$(sh .ci/newest-python) || exit 0; \
	$(MAKE) test test-slow VENV=.venv-newest PYTHON="$$python" ANEW=--compile-anew

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "onstep needs Python >= 3.11; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

.venv-lowest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) .ci/lowest.py >.venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/lowest.txt \
		-e '.[config,examples]' hypothesis pytest pytest-xdist
	@touch $@

clean:
	rm -rf .venv .venv-lowest .venv-newest build dist runs site *.egg-info
