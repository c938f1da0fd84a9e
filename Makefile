# make setup         install everything into .venv
# make test          lint, types, import layers, tests: some 10 minutes on 2 cores
# make test-slow     the long tests that `make test` leaves out
# make test-resume   kill a small run at 20 random moments, on one process and on two, and compare it with a whole run
# make fuzz          1,000 broken and hostile files through `salmonn caption`
# make mrdpo         all of mrDPO at toy size, with a table and a plot at the end
# make proof         mrDPO at toy size on 3 seeds: 16 CPU minutes for each seed (RECIPE=mrdpo_plain: with the papers' settings)
# make ablation      the papers' ablation at toy size on 3 seeds: an hour or more on 2 cores
# make lab           what is claimed of pairs, losses, votes, rebirth and feedback, on 3 seeds next to controls; update docs/lab.md: two hours
# make lab-rewards   what is claimed of reward models, on 3 seeds next to controls; update docs/lab.md: an estimated 90 minutes
# make bench         compare speed with a plain implementation, TRL and other decoders; update docs/performance.md
# make gpu-check     check and measure the GPU path at 7B shapes, on one GPU with 80 GiB or more (not run yet)
# make image         build the Docker image for CPUs where Docker is installed (make image-cuda: for NVIDIA GPUs)
# make docs          build the documentation in site/
# make tiny          train the toy model from scratch and replace the shipped one: two hours on 2 cores
PYTHON ?= python3
# The build of torch that the default index has. For a CUDA or CPU build, add --extra-index-url.
TORCH ?= torch==2.13.0
# The toy model is too small to use two cores by threads; a GPU holds one process.
PROCESSES ?= $(shell nvidia-smi > /dev/null 2>&1 && echo 1 || echo 2)
# Settings of `make proof`: mrdpo or mrdpo_plain.
RECIPE ?= mrdpo
VENV := .venv
BIN := $(VENV)/bin
EXACTNESS_TESTS := tests/test_parity.py tests/model/test_qwen3_vl.py tests/model/test_d_orca.py tests/caption/test_omni.py \
	tests/caption/test_generic.py

.PHONY: image image-cuda setup test test-slow exactness test-resume fuzz docs lint mrdpo proof ablation lab lab-rewards bench gpu-check tiny clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH) --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps openai-whisper==20250625
	touch $@

test: lint
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(BIN)/pytest -q -n 2 --dist loadfile -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

mrdpo: setup
	$(BIN)/torchrun --standalone --nproc_per_node=$(PROCESSES) recipes/mrdpo.py --config recipes/configs/mrdpo.yaml

proof: setup
	$(BIN)/python tools/ablation.py --variants mrdpo --config recipes/configs/$(RECIPE).yaml --clips-seed 100 \
	    --seeds 2 3 4 --jobs $(PROCESSES) --out run/proof/$(RECIPE)

ablation: setup
	$(BIN)/python tools/ablation.py --seeds 2 3 4 --jobs $(PROCESSES)

# All parts, or some of them: make lab PARTS="losses nash".
lab: setup
	$(BIN)/python tools/lab_selection.py --seeds 2 3 4 --jobs $(PROCESSES) --document docs/lab.md $(if $(PARTS),--parts $(PARTS))

lab-rewards: setup
	$(BIN)/python tools/lab_rewards.py --seeds 2 3 4 --jobs $(PROCESSES) --document docs/lab.md $(if $(PARTS),--parts $(PARTS))

test-resume: setup
	$(BIN)/python tools/resume.py --num-kills 20 --processes 1 2

fuzz: setup
	$(BIN)/pytest -q -s -m slow tests/test_fuzz.py

# The table of differences from transformers and the published code (docs/published.md).
exactness: setup
	$(BIN)/pytest -q -s $(EXACTNESS_TESTS) | grep -E '^(\||[0-9]+ (passed|failed))'

# CPU_INDEX and CUDA_INDEX are the indexes of the builds of torch.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
CUDA_INDEX ?= https://download.pytorch.org/whl/cu130

image:
	@if docker info > /dev/null 2>&1; then \
	  docker build --tag salmonn --build-arg TORCH=$(TORCH) --build-arg INDEX=$(CPU_INDEX) . && docker run --rm salmonn --version; \
	else echo "no image was built: Docker is not installed, or its service is not running"; fi

image-cuda:
	@if docker info > /dev/null 2>&1; then \
	  docker build --tag salmonn-cuda --build-arg TORCH=$(TORCH) --build-arg INDEX=$(CUDA_INDEX) . && \
	  docker run --rm salmonn-cuda --version; \
	else echo "no image was built: Docker is not installed, or its service is not running"; fi

docs: setup
	$(BIN)/mkdocs build

bench: setup
	$(BIN)/python -m pip install --quiet $(TORCH) --editable ".[dev,bench]"
	$(BIN)/python tools/bench/all.py --document docs/performance.md

gpu-check: setup
	$(BIN)/python tools/bench/gpu_check.py --device cuda --dtype bfloat16 --shape 7b --out gpu_check.json

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
