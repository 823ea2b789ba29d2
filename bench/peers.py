"""transformers on the same weights: its experts implementations, each in the leanest loop one can write.

Not `model.generate()`: a bare loop of forward and argmax over a `DynamicCache` is faster, and the fastest peer is
the fair one. It is fed the tokens Fiddler made, so both visit the same experts and read the same bytes.
"""

from pathlib import Path
from time import perf_counter

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from bench.machine import free_bytes
from bench.workload import Run, Unavailable, Workload
from fiddler.models import seam

GATHERING = "batched_mm"
"""Gathers a copy of the weights per visit: hundreds of tokens at once would need hundreds of gigabytes."""
PROMPT_INSTEAD = "eager"
"""Runs the prompt where `GATHERING` cannot."""
LOAD_ROOM = 1.2
"""Loading takes this many times the checkpoint's size."""


def load(folder: Path) -> PreTrainedModel | Unavailable:
    """Load the whole model, if memory has room for it."""
    n_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if n_bytes * LOAD_ROOM > free_bytes():
        return Unavailable(f"needs {n_bytes * LOAD_ROOM / 1e9:.0f} GB of memory, {free_bytes() / 1e9:.0f} are free")
    transformers.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


def run(
    model: PreTrainedModel,
    experts: str,
    workload: Workload,
    prompts: list[list[int]],
    tokens: tuple[tuple[int, ...], ...],
) -> Run | Unavailable:
    """Run a workload with one experts implementation, feeding it the tokens that were made before."""
    n_top = model.config.get_text_config().num_experts_per_tok
    gathered = {
        n: n * n_top * expert_bytes(model) for n in (workload.n_sequences, workload.n_sequences * workload.n_input)
    }
    fits = {n: experts != GATHERING or n_bytes < free_bytes() / 2 for n, n_bytes in gathered.items()}
    if not fits[workload.n_sequences]:
        return Unavailable(f"would gather {gathered[workload.n_sequences] / 1e9:.0f} GB of weights a layer")
    prompt_fits = fits[workload.n_sequences * workload.n_input]
    try:
        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            model.set_experts_implementation(experts if prompt_fits else PROMPT_INSTEAD)
            first_s = _forward(model, cache, torch.tensor(prompts))
            model.set_experts_implementation(experts)
            made = torch.tensor(tokens)  # [B, n_output]
            decode_s = sum(_forward(model, cache, made[:, i, None]) for i in range(workload.n_output - 1))
    except (RuntimeError, ValueError, ImportError) as error:
        return Unavailable(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return Run(first_s if prompt_fits else None, decode_s, workload.n_sequences, workload.n_output)


def _forward(model: PreTrainedModel, cache: DynamicCache, ids: Tensor) -> float:
    """Run one forward and pick each sequence's next token; returns its seconds."""
    started = perf_counter()
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    logits[:, -1].argmax(-1).tolist()
    return perf_counter() - started


def expert_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of one expert."""
    module = next(iter(seam.find_experts(model).values()))
    return sum(p.nbytes // p.shape[0] for p in module.parameters())
