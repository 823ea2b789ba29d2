"""How large the parts of a checkpoint are, from its headers and the shapes of the model's dense part."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from transformers import PreTrainedModel

from fiddler.models import seam
from fiddler.models.naming import expert_layout
from fiddler.store.checkpoint import Checkpoint, Entry
from fiddler.store.mapped import Every, ExpertParts, Select, View


@dataclass(frozen=True, slots=True)
class Amount:
    """An amount of weights."""

    parameters: int
    bytes: int

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.parameters + other.parameters, self.bytes + other.bytes)

    def __mul__(self, n: int) -> "Amount":
        return Amount(self.parameters * n, self.bytes * n)


NOTHING = Amount(0, 0)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The weights of a model, in all and as a token reads them."""

    dense: Amount
    experts: Amount
    total: Amount
    experts_per_layer: int
    """Of the layer that has the most."""
    top_k: int
    """Experts a token visits in a layer, of the layer where they are the most."""
    bytes_per_expert: int
    expert_bytes_per_token: int
    dense_bytes_per_token: int
    """All of the dense part, but one row of embeddings that serve nothing else."""


def measure(skeleton: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> Sizes:
    """Measure a model by its skeleton on the meta device. Raises `CheckpointError` where experts are missing."""
    modules = seam.find_experts(skeleton)
    layout = expert_layout(skeleton, modules, checkpoint)
    dense, dense_per_token = _dense(skeleton, dtype)
    each = [_expert(layer[0], checkpoint.entries) for layer in layout.experts]
    top_k = [_top_k(skeleton, path) for path in modules]
    experts = sum((one * n for one, n in zip(each, layout.n_experts, strict=True)), NOTHING)
    return Sizes(
        dense=dense,
        experts=experts,
        total=dense + experts,
        experts_per_layer=max(layout.n_experts),
        top_k=max(top_k),
        bytes_per_expert=max(one.bytes for one in each),
        expert_bytes_per_token=sum(one.bytes * k for one, k in zip(each, top_k, strict=True)),
        dense_bytes_per_token=dense_per_token,
    )


def _dense(skeleton: PreTrainedModel, dtype: torch.dtype) -> tuple[Amount, int]:
    """Return the dense part, tied weights counted once, and the bytes of it that a token reads."""
    stored = {id(tensor): tensor for tensor in skeleton.state_dict(keep_vars=True).values()}
    n_all = sum(tensor.numel() for tensor in stored.values())
    embeddings: Any = skeleton.get_input_embeddings()
    head: Any = skeleton.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    n_read = n_all if tied else n_all - embeddings.weight.numel()
    return Amount(n_all, n_all * dtype.itemsize), n_read * dtype.itemsize


def _expert(parts: ExpertParts, entries: Mapping[str, Entry]) -> Amount:
    biases = parts.up_bias if parts.down_bias is None else (*parts.up_bias, parts.down_bias)
    return sum((_view(view, entries[view.tensor]) for view in (*parts.up, parts.down, *biases)), NOTHING)


def _view(view: View, entry: Entry) -> Amount:
    share = 1
    for step in view.steps:
        if isinstance(step, Select):
            share *= entry.shape[0]
        elif isinstance(step, Every):
            share *= 2
    return Amount(prod(entry.shape) // share, entry.nbytes // share)


def _top_k(skeleton: PreTrainedModel, path: str) -> int:
    """Return how many of a layer's experts a token visits: its router says it, or else the configuration."""
    block = skeleton.get_submodule(path.rpartition(".")[0])
    for module in block.modules():
        if isinstance(found := getattr(module, "top_k", None), int):
            return found
    text: Any = skeleton.config.get_text_config()
    return int(getattr(text, "num_experts_per_tok", None) or text.top_k_experts)
