# bdhf: every target sets up what it needs. `make help` lists them.

SCALE  ?= laptop
SEEDS  ?=
RESULTS ?= results
# Runs made at once, each on one thread: two such processes do more than one with two threads.
CORES  := $(shell nproc 2>/dev/null || echo 1)
FEW    := $(shell echo $(CORES) 8 | xargs -n1 | sort -n | head -1)
JOBS   ?= $(shell command -v nvidia-smi >/dev/null && echo 1 || echo $(FEW))
PYTHON ?= python3
VENV   ?= .venv

RUN    := $(VENV)/bin/python
READY  := $(VENV)/.ready
# One plain command, so that make hands signals on to it.
EMPTY  :=
COMMA  := ,
SWEEP  := $(RUN) scripts/reproduce.py scale=$(SCALE) results=$(RESULTS) \
  $(addprefix seed=,$(subst $(EMPTY) $(EMPTY),$(COMMA),$(strip $(SEEDS))))
ifdef LAUNCHER
SWEEP  += hydra/launcher=$(LAUNCHER)
else ifneq ($(JOBS),1)
SWEEP  += hydra/launcher=processes hydra.launcher.n_jobs=$(JOBS) threads=1
endif
SWEEP  += $(OVERRIDES)
MEASURE := $(RUN) scripts/measure.py $(SCALE) --results $(RESULTS)
# The README shows the laptop scale.
REPORT := $(RUN) scripts/report.py $(SCALE) --results $(RESULTS) \
  $(if $(filter laptop:results,$(SCALE):$(RESULTS)),--readme)

.DEFAULT_GOAL := help
EXPERIMENTS := $(basename $(notdir $(wildcard experiments/*.py)))

.PHONY: help setup demo test test-slow bench bench-gpu plan reproduce-all tune measure scaling
.PHONY: bundle collect figures report clean wandb-sync wandb-dashboard
.PHONY: $(addprefix reproduce-,$(EXPERIMENTS))

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' \
	  | awk -F '\t' '{ printf "  make %-24s %s\n", $$1, $$2 }'
	@echo
	@echo "  SCALE=paper|laptop|demo picks all sizes at once (default: laptop);"
	@echo "  SEEDS=0,1 makes these seeds only (default: all of the scale's);"
	@echo "  JOBS=2 makes so many runs at once (default: one a core, at most 8; 1 with a GPU);"
	@echo "  RESULTS=trials keeps runs, tables and figures in another folder (default: results);"
	@echo "  LAUNCHER=slurm makes each run a job of a cluster (configs/hydra/launcher);"
	@echo "  OVERRIDES='time_limit=540 ...' adds settings of any key;"
	@echo "  BDHF_DATA=FOLDER names a folder with data sets (default: data, filled by download)."

setup: $(READY) ## a virtual environment with pinned versions in .venv

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  torch torchvision
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[suite,dev]'
	@touch $@

demo: $(READY) ## all experiments and optimizers, small: about a minute, nothing to download
	@$(MAKE) --no-print-directory reproduce-all SCALE=demo

plan: $(READY) ## what is done at SCALE, what is left, how long that will take
	$(SWEEP) --plan all study=null,blocks

reproduce-all: $(READY) ## every run of every experiment at SCALE, then figures, verdicts, the page
	$(SWEEP) all study=null,blocks
	-$(MEASURE)
	$(REPORT)

reproduce-autoencoder: ## figure 1
reproduce-lstm: ## figure 2
reproduce-resnet: ## figure 3
$(addprefix reproduce-,$(EXPERIMENTS)): reproduce-%: $(READY)
	$(SWEEP) $*

tune: $(READY) ## try other settings, one at a time, on a validation split (configs/studies/tuning.yaml)
	$(SWEEP) all study=tuning

measure: $(READY) ## time updates and count CG iterations on finished runs; leave the machine alone
	$(MEASURE)

scaling: $(READY) ## a model of updates on many devices, from what this machine measures (AGAIN=1: anew)
	$(RUN) scripts/scaling.py $(SCALE) --results $(RESULTS) $(if $(AGAIN),--again)

bundle: $(READY) ## one file with wheels, data and code, to make runs where there is no internet
	$(RUN) scripts/bundle.py $(addprefix --python-version ,$(PYTHON_VERSION))

collect: $(READY) ## merge run folders, also those in archives FROM=..., into results/SCALE
	$(RUN) scripts/collect.py $(SCALE) --results $(RESULTS) $(if $(FROM),--from $(FROM))

figures: $(READY) ## redraw the figures of SCALE from results/SCALE/curves.csv
	$(RUN) scripts/figures.py $(SCALE) --results $(RESULTS)

report: $(READY) ## verdicts, report.md and report.html of SCALE, from the tables in results/SCALE
	$(REPORT)

wandb-sync: $(READY) ## publish ended runs of SCALE to Weights & Biases, each once
	$(RUN) scripts/wandb_sync.py $(SCALE) --results $(RESULTS) $(addprefix --project ,$(PROJECT)) \
	  $(addprefix --entity ,$(ENTITY))

wandb-dashboard: $(READY) ## the W&B report of SCALE in ENTITY's project
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[suite,dashboard]'
	$(RUN) scripts/wandb_dashboard.py $(SCALE) --results $(RESULTS) $(addprefix --project ,$(PROJECT)) \
	  $(addprefix --entity ,$(ENTITY))

test: $(READY) ## style, types and tests; minutes
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest --numprocesses $(FEW) --dist loadfile

test-slow: $(READY) ## the tests that take minutes each, on real data where BDHF_DATA has it
	$(RUN) -m pytest -m slow

bench: $(READY) ## what an update costs, beside the peers: benchmarks/results.md, growth.png
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[suite,bench]'
	$(RUN) benchmarks/run.py --output benchmarks/results.md
	$(RUN) benchmarks/growth.py

bench-gpu: $(READY) ## the same on a GPU, at the paper's sizes: benchmarks/gpu.md
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[suite,bench]'
	$(RUN) benchmarks/gpu.py --output benchmarks/gpu.md

clean: ## remove the virtual environment and caches (not results)
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
