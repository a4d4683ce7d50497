# Each target works alone on a fresh clone: it makes .venv and installs what it needs.
.PHONY: quickstart test faults bench quality style docs clean

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1
INSTALL = $(BIN)/pip install -q --no-compile -c constraints.txt
# pip would compile on one core, and also the tests that other packages bring
COMPILE = $(BIN)/python -m compileall -qq -j 0 -x '/tests?/' .venv/lib || true

# The stamps are rebuilt when what they install from has changed.
.venv/core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) -e .
	$(COMPILE)
	touch $@

.venv/dev: .venv/core
	$(INSTALL) -e '.[test,quality]'
	$(INSTALL) --no-deps torchxrayvision  # for the reports in it, which need no torchvision
	$(COMPILE)
	touch $@

.venv/docs: .venv/core
	$(INSTALL) -e '.[docs]'
	$(COMPILE)
	touch $@

quickstart: .venv/core  ## search, fine-tune, measure and save an adapter, on the demo that ships in the package
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process 2 training_scripts/train_memcontrol.py

test: .venv/dev  ## the tests, on CPU and without the network
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests -n auto --dist loadfile

faults: .venv/dev  ## kill the whole command at many moments of its life; half an hour, resumable
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/kill_moments.py

bench: .venv/dev  ## what this package costs beside the bare work: docs/performance.md; ROWS=training_step measures some
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=tests:training_scripts/studies $(BIN)/python -m benchmarks $(ROWS)

quality: .venv/dev  ## what CI checks of the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: .venv/dev  ## mend the style in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/docs  ## the pages of docs/ and the docstrings as a site, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv site build *.egg-info  # not outputs: adapters, and the finished pieces of long studies
