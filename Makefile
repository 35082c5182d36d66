# What people and continuous integration call. `make help` lists it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DATA ?=
MINUTES ?= 30
PRESET ?= small
SPEC ?= tests/tiny.yaml

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
VARIANT ?= cpu
DOCKER ?= docker
APPTAINER ?= apptainer
IMAGE ?= emotion-job:$(VERSION)-$(VARIANT)
SIF ?= dist/emotion-job-$(VERSION)-$(VARIANT).sif
BASE ?=
MKSQUASHFS ?=

.PHONY: help setup run small augmentation check test test-all docs soak bench bench-gpu lock image sif image-test image-report clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup: $(INSTALLED)  ## make the virtual environment, once

# Everything in one step, so that pip resolves the exact pin of torch together with all packages that depend on it.
$(INSTALLED): pyproject.toml container/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo 'makes $(VENV), 2.3 GiB with the CPU build of torch (README.md, Start), else more: some minutes without a word' >&2
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint container/constraints.txt --editable '.[job,slurm,track,dev]'
	$(BIN)/python -c 'from emotion.compat import timm; timm.create_model("test_vit", in_chans=1, num_classes=2)'
	touch $@

run: setup  ## run the demo job: every phase for real, on generated songs
	$(BIN)/emotion-job run job/specs/demo.yaml --work work

small: setup  ## five folds on your own songs, CPU: make small DATA=folder, with SCALE='[1, 9]' if it has a songs.csv; PRESET=small-pretrained
	@test -n "$(DATA)" || { echo 'make small DATA=folder: name a folder with songs and a songs.csv, or with DEAM' >&2; exit 64; }
	set --; for fold in 0 1 2 3 4; do \
	    run=$$($(BIN)/emotion-job run job/specs/$(PRESET).yaml --work work --set data.source="$(DATA)" \
	        $(if $(SCALE),--set data.scale='$(SCALE)') --set split.fold=$$fold) || exit; \
	    set -- "$$@" "$$run"; \
	done; $(BIN)/emotion-job collect "$$@" --out work/collected

augmentation: setup  ## synthetic clips, C-Mixup and SpecAugment compared on your songs, CPU: 135 tasks; DATA and SCALE as for small
	@test -n "$(DATA)" || { echo 'make augmentation DATA=folder: name a folder with songs and a songs.csv, or with DEAM' >&2; exit 64; }
	$(BIN)/emotion-slurm local slurm/examples/augmentation.yaml --work work --set data.source="$(DATA)" \
	    $(if $(SCALE),--set data.scale='$(SCALE)')

check: setup  ## format, lint, types, import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The order is kept, so that the longest group of test-all, the containers, begins first. The clusters have time limits of seconds:
# they run alone. `make test test-all` runs no test twice.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --no-loadscope-reorder

# If it were set, pytest would recompile all test files in each process.
unexport PYTHONDONTWRITEBYTECODE

test: setup  ## the tests that need nothing but Python; a few minutes
	$(PYTEST)

test-all: test  ## everything this machine allows; REQUIRE_ALL=1 turns a missing component into a failure
	$(PYTEST) --all -m full --ignore-glob='tests/slurm/test_on_slurm*'
	$(BIN)/python -m pytest --all -m full tests/slurm/test_on_slurm*.py

docs: setup  ## regenerate the tables in the documents
	$(BIN)/python -m tests.documents

soak: setup  ## kill a job at random moments until it is done, repeatedly: make soak MINUTES=30 SPEC=file
	$(BIN)/python -m tests.job.soak --minutes $(MINUTES) --spec $(SPEC)

bench: setup  ## run the benchmarks behind the documents' tables: speed, memory, what a save survives
	$(BIN)/python -m pip install --quiet --constraint container/constraints.txt --editable '.[job,slurm,track,dev,bench]'
	$(BIN)/python -m tests.bench $(if $(JSON),--json $(JSON))

bench-gpu: setup  ## measure whole jobs on a GPU against the goals, in about six minutes
	$(BIN)/python -m tests.bench.gpu

lock: setup  ## rewrite constraints.txt and the lock files from the environment in use
	container/lock.sh

# Another variant or another lock: other wheels.
container/wheels/.$(VARIANT): container/lock-$(VARIANT).txt container/lock-build.txt | $(INSTALLED)
	container/wheels.sh $(VARIANT)

image: container/wheels/.$(VARIANT)  ## build the image: make image VARIANT=cpu or cuda, BASE=other base image
	DOCKER_BUILDKIT=1 $(DOCKER) build --network none --file container/Dockerfile --tag $(IMAGE) \
	    --build-arg VARIANT=$(VARIANT) --build-arg IMAGE=$(IMAGE) --build-arg VERSION=$(VERSION) \
	    --build-arg REVISION="$$(git describe --always --dirty --abbrev=40 --exclude '*' || echo unknown)" \
	    $(if $(BASE),--build-arg BASE=$(BASE)) .

sif: image  ## the same image as one file, for Apptainer
	mkdir -p $(dir $(SIF))
	$(DOCKER) save --output $(SIF).tar $(IMAGE)
	$(APPTAINER) build --force --disable-cache --build-arg ARCHIVE=$(SIF).tar \
	    $(if $(MKSQUASHFS),--mksquashfs-args "$(MKSQUASHFS)") $(SIF) container/emotion.def
	rm $(SIF).tar

image-test: setup  ## build image and SIF for real and run jobs in them, as root on Debian; part of test-all
	REQUIRE_ALL=1 $(BIN)/python -m pytest --all tests/container

image-report: setup  ## measure the image: size, largest folders, time to the first step
	DOCKER=$(DOCKER) $(BIN)/python tests/bench/image.py $(IMAGE) $(wildcard $(SIF))

clean:  ## remove what make made, except results
	rm -rf $(VENV) build dist container/wheels *.egg-info .mypy_cache .ruff_cache .pytest_cache
