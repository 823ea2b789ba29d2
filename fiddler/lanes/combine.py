"""Rows out to the experts and their results back, independent of who finished first."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fiddler.scheduler.routing import LayerWork


def gather(hidden: Tensor, work: LayerWork, top_k: int) -> Tensor:
    """Return the rows `[n, H]` of `hidden` `[T, H]` in the work's order, one per visit."""
    if hidden.shape[0] == 1:
        return hidden.expand(len(work.order), -1)
    return hidden.index_select(0, torch.tensor([p // top_k for p in work.order], dtype=torch.long, device="cpu"))


def combine(outputs: Tensor, order: Sequence[int], weights: Tensor) -> Tensor:
    """Return the weighted sum `[T, H]` of expert `outputs` `[n, H]`, over `weights` `[T, K]`, in routing order.

    `order` is the position in the flattened routing of each output.

    Every visit has a row of its own in one `[T·K, H]` buffer, zero where it was dropped, so the sum's order,
    and with it every bit of the result, depends on the routing alone.
    """
    n_tokens, top_k = weights.shape
    dropped = len(order)
    rows = [dropped] * (n_tokens * top_k)
    for row, position in enumerate(order):
        rows[position] = row
    if dropped < len(rows):
        outputs = torch.cat([outputs, outputs.new_zeros(1, outputs.shape[1])])
    return summed(outputs.index_select(0, torch.tensor(rows, dtype=torch.long, device="cpu")), weights)


def summed(visits: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum `[T, H]` of `visits` `[T·K, H]` over `weights` `[T, K]`, in routing order."""
    weighted = visits.view(*weights.shape, -1) * weights[..., None]  # [T, K, H]
    return weighted.sum(dim=1).to(visits.dtype)
