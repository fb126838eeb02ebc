# make demo         trains two toy domains with and without unlabelled images, and writes a report (about 5 minutes on 2 cores after installation)
# make test         what CI runs: lint, types, every test
# make reliability  tests the promises of docs/reliability.md at their full figures, and tabulates what each reached
# make mutants      puts small faults into a copy of the code, one at a time, and counts those that tests notice (104 in about 20 minutes)
# make browser      fetches onnxruntime-web by npm, with which a test runs docs/export.md's JavaScript in chromium
# make gpu          proves and measures what a CUDA card changes, in nine minutes without a network; docs/gpu.md (WHEELS=DIR installs from there)
# make bench        runs the benchmarks (14 minutes on 2 quiet cores); docs/speed.md explains their figures

PYTHON ?= python3
BIN := .venv/bin
# Accelerate prints a warning about each option that is left out.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

# Test files that run at once.
JOBS ?= 2

.PHONY: demo test lint reliability mutants gpu bench browser docs clean

.venv/demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[lite]'
	touch $@

.venv/dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[lite,dev]'
	touch $@ .venv/demo

demo: .venv/demo
	$(BIN)/python -m multidomain_cct pack toy_street
	$(BIN)/python -m multidomain_cct pack toy_room
	$(LAUNCH) -m multidomain_cct recipes/demo.yaml resume=auto name=demo_supervised method=supervised ema=0.99
	$(LAUNCH) -m multidomain_cct recipes/demo.yaml resume=auto
	$(BIN)/python -m multidomain_cct report runs/demo runs/demo_supervised --out runs/demo.html

test: .venv/dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

reliability: .venv/dev
	MDCCT_RELIABILITY=full $(BIN)/python -m pytest tests/reliability

mutants: .venv/dev
	$(BIN)/python benchmarks/mutants.py --jobs $(JOBS)

browser:
	npm install --silent --no-save --no-package-lock onnxruntime-web

# With the Python that has torch for the card, not the environment of this project: nothing is downloaded.
gpu:
	$(PYTHON) benchmarks/gpu.py --minutes 9 --out results/gpu $(if $(WHEELS),--wheels $(WHEELS))

THREADS ?= 2
PAPER := --encoder resnet50 --context psp --width 512 --stride 8 --decoder pixelshuffle --decoders 30 --classes 21 --batch 2 --threads $(THREADS)
LAPTOP := --encoder tf_efficientnet_lite0 --context fpn --width 128 --decoders 12 --classes 11 --crop 208 --batch 8 --threads $(THREADS)

bench: .venv/dev
	$(BIN)/python benchmarks/step.py $(PAPER) --crop 160 --steps 5
	$(BIN)/python benchmarks/step.py $(PAPER) --crop 320 --steps 7
	$(BIN)/python benchmarks/step.py $(LAPTOP) --decoder pixelshuffle --steps 7
	$(BIN)/python benchmarks/step.py $(LAPTOP) --decoder bilinear --steps 5
	$(BIN)/python benchmarks/step.py $(LAPTOP) --decoder bilinear --steps 7 --only ours strong
	$(BIN)/python benchmarks/memory.py --threads $(THREADS)
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/evaluate.py
	$(BIN)/python benchmarks/resume.py
	$(BIN)/python benchmarks/pack.py
	$(BIN)/python benchmarks/crf.py
	$(BIN)/python benchmarks/scale.py

docs: .venv/dev
	$(BIN)/python docs/recipe_reference.py

clean:
	rm -rf .venv dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
