# make setup   install everything into .venv
# make test    lint, types, import layers, tests
# make mrdpo   the whole loop at toy size, with a table and a picture at its end
# make ablation      the papers' ablation at toy size, 3 seeds: an hour or more on 2 cores
# make test-resume   a small run killed at 20 random moments, by one process and by two, against an unbroken one
# make fuzz    1,000 broken and hostile files through `salmonn caption`
# make docs    the documentation as a site, in site/
# make bench   ours against the plain way, TRL and other readers: bench.json and the table of docs/performance.md
# make tiny    train the toy model from nothing and ship it in place of the old one (two hours on 2 cores)
PYTHON ?= python3
# The build of torch: the one that your index gives for this version. For another (CUDA or CPU), point pip at its index.
TORCH ?= torch==2.13.0
# The toy model is too small to keep two cores busy by threads; a GPU holds one process.
PROCESSES ?= $(shell nvidia-smi > /dev/null 2>&1 && echo 1 || echo 2)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup test test-resume fuzz docs lint mrdpo proof ablation bench tiny clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH) --editable ".[dev]"
	touch $@

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

mrdpo: setup
	$(BIN)/torchrun --standalone --nproc_per_node=$(PROCESSES) recipes/mrdpo.py --config recipes/configs/mrdpo.yaml

proof: setup
	$(BIN)/python tools/proof.py --seeds 2 3 4 --processes $(PROCESSES)

ablation: setup
	$(BIN)/python tools/ablation.py --seeds 2 3 4 --jobs $(PROCESSES)

test-resume: setup
	$(BIN)/python tools/resume.py --kills 20 --processes 1 2

fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -s -m slow tests/test_fuzz.py

docs: setup
	$(BIN)/mkdocs build

bench: setup
	$(BIN)/python -m pip install --quiet $(TORCH) --editable ".[dev,bench]"
	$(BIN)/python tools/bench/all.py --document docs/performance.md

tiny: setup
	$(BIN)/torchrun recipes/sft.py --config recipes/configs/pretrain_1_objects.yaml
	$(BIN)/torchrun recipes/sft.py --config recipes/configs/pretrain_2_actions.yaml
	$(BIN)/torchrun recipes/sft.py --config recipes/configs/pretrain_3_scenes.yaml
	$(BIN)/torchrun recipes/sft.py --config recipes/configs/pretrain_4_audio.yaml
	$(BIN)/torchrun recipes/sft.py --config recipes/configs/pretrain_5_captions.yaml
	$(BIN)/torchrun recipes/sft.py --config recipes/configs/pretrain_6_restart.yaml
	$(BIN)/torchrun recipes/sft.py --config recipes/configs/align_audio.yaml
	$(BIN)/torchrun recipes/sft.py --config recipes/configs/sft.yaml
	cp run/sft/av/config.json run/sft/av/model.safetensors run/sft/av/tokenizer.json \
	   run/sft/av/tokenizer_config.json run/sft/av/chat_template.jinja salmonn/tiny/

clean:
	rm -rf $(VENV)
