"""Experts of a model whose every expert is in a slot: nothing is left to decide, so the host is not asked.

Who visits whom stays on the GPU, and a decoding step is one recorded piece from its tokens to its logits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fiddler.devices.slot_experts import SlotExperts, Visits
from fiddler.lanes.experts import Ask, LaneCounters, summed
from fiddler.lanes.gpu_crossing import blank_visits


@dataclass(frozen=True, slots=True)
class Resident:
    """Runs layers without the host, where the kernels do not need it either."""

    experts: SlotExperts
    slots: Callable[[int], Tensor]
    """By layer, the slots of its experts, int32 `[E]` on the GPU; they stay as they are."""
    counters: LaneCounters
    """Where visits are counted, and nothing else: which experts they are of, nobody on the host knows."""

    def runs(self, layer: int, hidden: Tensor) -> bool:
        """Whether it runs a layer for rows `[T, H]`."""
        return self.experts.blind(layer, hidden.shape[0], hidden)

    def __call__(self, ask: Ask) -> Tensor:
        """Queue a layer; returns its output `[T, H]`. Visits of nobody, or of weight zero, add nothing."""
        visits, out = grouped(ask.index, ask.weights, self.slots(ask.layer)), blank_visits(ask)
        self.experts.run(ask.layer, visits, ask.hidden, out)
        return summed(out, ask.weights)


def grouped(index: Tensor, weights: Tensor, slots: Tensor) -> Visits:
    """Group a routing `[T, K]` by slot without reading it on the host; `slots` are int32 `[E]`, by expert.

    Every expert has a group, which may be empty. Positions behind the last group are of visits that add nothing.
    """
    n_tokens, top_k = index.shape
    n_experts, visited = slots.shape[0], index.flatten()
    real = (visited >= 0) & (visited < n_experts) & (weights.flatten() != 0)
    expert, position = torch.where(real, visited, n_experts).sort(stable=True)
    every = torch.arange(n_experts + 1, device=index.device)
    bounds = torch.searchsorted(expert, every, out_int32=True)
    return Visits(slots, bounds, position.to(torch.int32), n_tokens, n_tokens * top_k, top_k, ())
