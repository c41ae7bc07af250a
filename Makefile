# SPDX-License-Identifier: Apache-2.0
# Everything installs itself into .venv once, with the versions of constraints.txt.

PYTHON ?= $(shell for p in python3.11 python3; do $$p -c "" 2>/dev/null && { command -v $$p; break; }; done)
BIN := .venv/bin
STAMP := .venv/.installed
# The bundles are part of this repository: no need to be warned that a config can run code.
BUNDLE_RUN := $(BIN)/python -W "ignore:parsing config_file" -m monai.bundle run
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo demo-3d demo-seg test lint bench clean
.DELETE_ON_ERROR:

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python found: install Python 3.11, or run: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[demo,mlflow,pacs,test]"
	@touch $@

# $(1): 2 or 3, $(2): classification or segmentation, $(3): bundle, $(4): output folder.
define run_demo
	$(BIN)/python -m monai_salm.cohorts.demo --dim $(1) --task $(2) --output $(4)/export
	$(BUNDLE_RUN) \
	    --config_file bundles/$(3)/configs/train.yaml \
	    --meta_file bundles/$(3)/configs/metadata.json \
	    --logging_file bundles/$(3)/configs/logging.conf \
	    --dataset_dir $(4)/export --output_dir $(4) --spatial_dims $(1)
endef

demo: $(STAMP)  ## protect the embedded 2D cohort and measure it (6 to 15 minutes): build/demo/report.html
	$(call run_demo,2,classification,salm_2d_classification,build/demo)

demo-3d: $(STAMP)  ## the same with 3D volumes (8 to 30 minutes): build/demo-3d/report.html
	$(call run_demo,3,classification,salm_3d_classification,build/demo-3d)

demo-seg: $(STAMP)  ## the same with lesions to segment in slices (20 to 40 minutes): build/demo-seg/report.html
	$(call run_demo,2,segmentation,salm_3d_segmentation,build/demo-seg)

test: $(STAMP)  ## run the tests; real images are used where MONAI_SALM_DATA names them
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

lint: $(STAMP)  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)  ## measure the fit's cost and the small arena again (hours); MONAI_SALM_DATA names the images
	@test -n "$(MONAI_SALM_DATA)" || { echo "set MONAI_SALM_DATA to the folder of pneumoniamnist.npz" >&2; exit 1; }
	$(BIN)/python benchmarks/fit_cost.py --output benchmarks/results/fit_cost.json
	$(BIN)/python benchmarks/arena.py benchmarks/arena_small.yaml --data $(MONAI_SALM_DATA) \
	    --output benchmarks/results/arena.csv

clean:  ## remove what was built, but not .venv
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
