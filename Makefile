# Two commands need no set-up: `make demo` (the whole journey on small videos) and `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The demo's data: empty for the made videos, or a folder of real clips (class folders, or train.csv and test.csv).
DATA ?=

# Of bench-export: names of backbones, turns of each engine, a folder of trained networks (r3d_18.safetensors, ...); empty
# for all, the usual number, and random weights.
BACKBONES ?=
TURNS ?=
CHECKPOINTS ?=

# Of bench-serving and bench-scoring: names of parts, and of servers; empty for all.
PARTS ?=
SERVERS ?=

# Of bench-scoring: a trained r3d_18 to hold against the obvious pipeline; empty for one of random weights.
CHECKPOINT ?=

.PHONY: help install demo test test-all test-gpu lint format typecheck bench bench-export bench-scoring bench-serving support-matrix results-training bench-training wheel-check all clean

help: ## show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"  # 25.1 reads dependency groups
	$(BIN)/python -m pip install --quiet --editable '.[all,s3,hf,trt-rtx]' --group train --group dev
	touch $@

install: $(STAMP) ## make .venv with everything the demo and the tests need

demo: $(STAMP) ## the whole journey, from videos to a served label (DATA=DIR for real clips)
	$(BIN)/python -m examples.demo $(if $(DATA),--data "$(DATA)")

# Most tests wait for processes that they start: two of them at a time take hardly more than half as long.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(STAMP) ## the tests; those for a GPU are skipped where there is none
	$(BIN)/python -m pytest $(PARALLEL) -m "not exhaustive"

test-all: $(STAMP) ## all tests, also the slow ones that repeat a check for every backbone, and those of large extras
	$(BIN)/python -m pip install --quiet --editable '.[ray,gcs,lance]' gcp-storage-emulator==2026.7.19
	$(BIN)/python -m pytest $(PARALLEL)

test-gpu: $(STAMP) ## the tests for a GPU; a missing GPU, TensorRT or onnxruntime-gpu is a failure
	IVDR_REQUIRE=gpu,trt,ort-gpu $(BIN)/python -m pytest -m "gpu or trt"

lint: $(STAMP) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## rewrite to the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(STAMP) ## check types
	$(BIN)/mypy

bench: $(STAMP) ## latency of the demo's bundle, engine against torch
	$(BIN)/ivdr bench runs/demo/bundle --videos runs/demo/data/test.csv

bench-export: $(STAMP) ## every backbone in every engine, proved and timed (BACKBONES="tiny r3d_18", TURNS=6, CHECKPOINTS=DIR)
	$(BIN)/python -m examples.engines.bench_export $(if $(BACKBONES),--backbones "$(BACKBONES)") $(if $(TURNS),--turns $(TURNS)) $(if $(CHECKPOINTS),--checkpoints "$(CHECKPOINTS)")

bench-serving: $(STAMP) ## both servers under load and under faults, a quarter of an hour (PARTS="latency batching", SERVERS=http)
	$(BIN)/python -m examples.serving.bench_serving $(if $(PARTS),--parts "$(PARTS)") $(if $(SERVERS),--servers "$(SERVERS)")

bench-scoring: $(STAMP) ## scoring of collections: throughput, kills, a million inputs planned, Ray (PARTS="plan ray", CHECKPOINT=r3d.safetensors)
	$(BIN)/python -m pip install --quiet --editable '.[ray]'
	$(BIN)/python -m examples.scoring.bench_scoring $(if $(PARTS),--only "$(PARTS)") $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)")

support-matrix: $(STAMP) ## write docs/support-matrix.md from the records in docs/results
	$(BIN)/python -m examples.engines.support_matrix

results-training: $(STAMP) ## what pre-training is worth: every method, five seeds, three sets (two hours or so; goes on where it stopped)
	$(BIN)/python -m examples.training

bench-training: $(STAMP) ## how fast training runs: step, loader, bf16, two processes; build/bench/training.json
	$(BIN)/python -m examples.training.bench

wheel-check: $(STAMP) ## build the wheel, install it in fresh environments, see that it is whole and works there
	$(BIN)/python -m pytest tests/packaging

all: lint typecheck test ## lint, types and tests

clean: ## remove what these targets made, the environment included
	rm -rf $(VENV) build dist runs .mypy_cache .pytest_cache .ruff_cache
