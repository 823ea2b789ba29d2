"""transformers in memory, one peer for each of its experts implementations; all share one model."""

import gc
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.machine import free_bytes
from bench.peers import forwards
from bench.peers.peer import Tokens, require, weight_bytes
from bench.workload import Run, UnavailableError, Workload
from fiddler.models import seam

GATHERING = "batched_mm"
"""Gathers a copy of the weights per visit: hundreds of tokens at once would need hundreds of gigabytes."""
PROMPT_INSTEAD = "eager"
"""Runs the prompt where `GATHERING` cannot."""
LOAD_ROOM = 1.2
"""Loading takes this many times the checkpoint's size."""
GATHER_SHARE = 0.5
"""Gathering may take this share of free memory: it gathers for one matrix while another's copy is still there."""

_models: WeakValueDictionary[Path, PreTrainedModel] = WeakValueDictionary()
"""By folder. Peers keep a model alive: three copies of the weights would not fit."""


def open_peer(name: str, folder: Path, threads: int) -> "TransformersPeer":
    """Open transformers with the experts implementation `name`. Raises `UnavailableError` if memory has no room."""
    folder = folder.resolve()
    model = _models.get(folder)
    if model is None:
        model = _models[folder] = _load(folder)
    return TransformersPeer(model, name, threads)


def _load(folder: Path) -> PreTrainedModel:
    require("memory", weight_bytes(folder) * LOAD_ROOM, free_bytes())
    transformers.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


class TransformersPeer:
    """A whole model in memory, run with one experts implementation."""

    def __init__(self, model: PreTrainedModel, experts: str, threads: int) -> None:
        self._model: PreTrainedModel | None = model
        self._experts = experts
        self._threads = threads

    def run(self, workload: Workload, prompts: Tokens, made: Tokens, patience_s: float) -> Run:
        """Run a workload, see `Peer`; without a first-token time where other experts had to run the prompt."""
        model = self._model
        assert model is not None, "the peer is closed"
        prompt_experts = _prompt_experts(model, self._experts, workload)

        def use_own_experts() -> None:
            if prompt_experts != self._experts:
                model.set_experts_implementation(self._experts)

        torch.set_num_threads(self._threads)
        model.set_experts_implementation(prompt_experts)
        run = forwards.run(model, workload, prompts, made, patience_s, after_prompt=use_own_experts)
        return run if prompt_experts == self._experts else replace(run, first_token_s=None)

    def close(self) -> None:
        """Let go of the model, which the last peer to do so frees."""
        self._model = None
        gc.collect()  # modules and their hooks refer to each other


def _prompt_experts(model: PreTrainedModel, experts: str, workload: Workload) -> str:
    """Return what can run the prompt. Raises `UnavailableError` where `experts` cannot decode."""
    if experts != GATHERING:
        return experts
    free = free_bytes() * GATHER_SHARE
    n_sequences = workload.n_sequences * workload.n_beams
    decode_bytes = n_sequences * row_bytes(model)
    prompt_bytes = decode_bytes * workload.n_input
    if decode_bytes > free:
        raise UnavailableError(f"would gather {decode_bytes / 1e9:.0f} GB of weights a layer")
    if prompt_bytes <= free:
        return experts
    if workload.n_beams > 1:
        raise UnavailableError(f"would gather {prompt_bytes / 1e9:.0f} GB of weights a layer for the prompt")
    return PROMPT_INSTEAD


def row_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the experts that a token visits in one layer."""
    module = next(iter(seam.find_experts(model).values()))
    n_top: int = model.config.get_text_config().num_experts_per_tok
    n_bytes: int = sum(p.nbytes // p.shape[0] for p in module.parameters())
    return n_top * n_bytes
