# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# the environment of other libraries' models: one of its own, or the same one
BEYOND ?= $(VENV)-beyond

.PHONY: demo test gpu slow backbones beyond zoo tables perf docs package notebooks lint types doctest examples coverage clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[demo,dev,nni,train]"
	touch $@

# trains a small residual network on real digits, prunes it, prints a table and writes a report
demo: $(STAMP)
	$(BIN)/singe demo --output singe_demo

# one worker for each core, and so one thread for each worker
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# what runs on a CUDA device against what runs on the CPU; skipped without one
gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

# thousands of generated networks
slow: $(STAMP)
	$(BIN)/python -m pytest -n auto -m slow

# every check on the smallest models of all timm modules, one process each; resumable, takes hours
backbones: $(STAMP)
	$(BIN)/python benchmarks/backbones.py run
	$(BIN)/python benchmarks/backbones.py table

# models of other libraries: the tests, the zoo's fast subset and the examples
beyond: $(BEYOND)/.beyond
	$(BEYOND)/bin/python -m pytest tests/test_transformers.py tests/test_libraries.py tests/test_audio_models.py tests/test_in_training.py
	$(BEYOND)/bin/python benchmarks/zoo.py run --fast
	@set -e; for example in examples/beyond_timm/*.py; do echo "== $$example"; $(BEYOND)/bin/python $$example; done

# every model of the zoo, one process each; resumable, takes an hour
zoo: $(BEYOND)/.beyond
	$(BEYOND)/bin/python -m pip install --quiet -e ".[zoo]"
	$(BEYOND)/bin/python benchmarks/zoo.py run
	$(BEYOND)/bin/python benchmarks/zoo.py table

$(BEYOND)/.beyond: pyproject.toml
	$(PYTHON) -m venv $(BEYOND)
	$(BEYOND)/bin/python -m pip install --quiet --upgrade pip
	$(BEYOND)/bin/python -m pip install --quiet -e ".[demo,dev,beyond,train]"
	touch $@

# docs/results.md and its plots again, from the stored rows
tables: $(STAMP)
	$(BIN)/python benchmarks/tables.py write

# ratios of speed against the stored ones; fails where one is 20 % worse
perf: $(STAMP)
	$(BIN)/python benchmarks/speed.py check

# the site, into site/: fails at a warning; nothing of it is loaded from elsewhere
docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict -f docs/site/mkdocs.yml
	$(VENV)-docs/bin/python -m pytest tests/test_site.py

$(VENV)-docs/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-docs/bin/python -m pip install --quiet -e ".[docs]" pytest
	touch $@

# the wheel: complete, nothing else in it, and works where nothing but it is installed
package: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/python .ci/check_wheel.py dist

# every notebook, in an environment of its own
notebooks: $(VENV)-notebooks/.installed
	$(VENV)-notebooks/bin/python -m pytest -m "slow or not slow" tests/test_notebooks.py

$(VENV)-notebooks/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-notebooks
	$(VENV)-notebooks/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-notebooks/bin/python -m pip install --quiet -e ".[demo,dev,beyond,notebooks]"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

doctest: $(STAMP)
	$(BIN)/python -m pytest --doctest-modules --import-mode=importlib singe_plugin

examples: $(STAMP)
	@set -e; for example in examples/*.py; do echo "== $$example"; $(BIN)/python $$example > /dev/null; done

# the tests with coverage measured around them, in twice the time
coverage: $(STAMP)
	$(BIN)/python -m pytest -n auto --cov --cov-report=term --cov-fail-under=90

clean:
	rm -rf $(VENV) $(BEYOND) $(VENV)-docs $(VENV)-notebooks site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache singe_demo
