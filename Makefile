# Two commands on a fresh machine: `make demo` and `make test`. Both make what they need first; a second run is quick.
PYTHON ?= python3
TORCH ?= 2.13.0
# Where pip should look for torch, if not in its configured indexes: make demo TORCH_INDEX=URL
TORCH_INDEX ?=
LOWEST_TRANSFORMERS := 5.17.0

VENV := .venv
LOWEST := .venv-lowest
RUN := $(VENV)/bin/python -m
PIP_INSTALL := install -qq --disable-pip-version-check
INDEX := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
# A machine without an NVIDIA GPU wants the CPU build, where an index has one: the other brings gigabytes of CUDA.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)

.PHONY: demo test gpu check lowest format figures documents clean
.DELETE_ON_ERROR:

demo: $(VENV)/.runtime
	$(RUN) fiddler generate

# One worker a core, whole files each: what a file's tests share is made once.
test: check lowest
	$(RUN) pytest -n auto --dist loadfile

# On a machine with an NVIDIA GPU: the kernels compiled, and the engine on the real thing. docs/gpu.md has the rest.
gpu: $(VENV)/.dev
	FIDDLER_GPU=1 $(RUN) pytest tests/gpu

check: $(VENV)/.dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(VENV)/bin/lint-imports --no-logo

# The seams are young: the exactness suite also runs on the oldest transformers that pyproject.toml admits.
lowest: $(LOWEST)/.dev
	$(LOWEST)/bin/python -m pytest tests/test_exactness.py

format: $(VENV)/.dev
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

# Every picture of README and docs, from committed results and recordings.
figures: $(VENV)/.dev
	$(RUN) bench.figures

# Every table of README and docs, from committed results.
documents: $(VENV)/.dev
	$(RUN) bench.documents

clean:
	rm -rf $(VENV) $(LOWEST)

define make_venv
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip $(PIP_INSTALL) "pip>=25.1"
	$(if $(HAS_GPU),,$(1)/bin/python -m pip $(PIP_INSTALL) $(INDEX) "torch==$(TORCH)+cpu" 2>/dev/null ||) \
		$(1)/bin/python -m pip $(PIP_INSTALL) $(INDEX) "torch==$(TORCH)"
endef

$(VENV)/.torch:
	@echo "Making $(VENV) …"
	@$(call make_venv,$(VENV))
	@touch $@

$(VENV)/.runtime: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "Installing Fiddler into $(VENV) …"
	@$(RUN) pip $(PIP_INSTALL) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "Installing the development tools …"
	@$(RUN) pip $(PIP_INSTALL) --constraint constraints.txt --group dev
	@touch $@

$(LOWEST)/.dev: pyproject.toml constraints.txt
	@echo "Making $(LOWEST), with transformers $(LOWEST_TRANSFORMERS) …"
	@$(call make_venv,$(LOWEST))
	@grep -vE '^(transformers|huggingface_hub)==' constraints.txt > $(LOWEST)/constraints.txt
	@$(LOWEST)/bin/python -m pip $(PIP_INSTALL) --constraint $(LOWEST)/constraints.txt \
		--editable . --group dev "transformers==$(LOWEST_TRANSFORMERS)"
	@touch $@
