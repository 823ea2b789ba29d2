"""What the parts of a step could reach on this machine, and what they do reach."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from bench.contest.rates import Limit, Results
from bench.kernels import attainable_gbs
from bench.report import Spread
from fiddler.models.loaded import ServableModel

PASSES = 5


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a model is read when it runs."""

    n_layers: int
    """Layers with experts."""
    dtype: str
    weight_bytes: int
    """Of one weight."""
    visited: float
    """Share of its experts that a token visits."""
    expert_bytes: int
    """All experts together."""
    dense_bytes: int
    """Everything a token reads beside experts and output layer; of the embedding it reads one row."""
    head_bytes: int
    expert_shapes: tuple[tuple[int, int], ...]
    """`[out, in]` of one expert's matrices, as they are multiplied."""
    dense_shapes: tuple[tuple[int, int], ...]
    head_shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a decoding step beside its limits."""

    part: str
    n_sequences: int
    step_ms: float
    gbs: float
    kernel_gbs: float
    """What the best single kernels reach on these shapes at this row count, with nothing in between."""
    of_kernel: float
    of_ceiling: float


@dataclass(frozen=True, slots=True)
class Overhead:
    """Medians over decoding steps."""

    n_sequences: int
    per_layer_us: float
    """What a layer's call for experts takes beyond its kernels."""
    routing_us: float
    """Of it: grouping rows by expert and combining what comes back."""
    kernels_us: float
    """Of it: what kernels lose by running between other work."""
    per_step_us: float
    """Of a step outside the forward: scheduling, sampling, handing out tokens."""


def sizes(loaded: ServableModel) -> Sizes:
    """Read the sizes off a loaded model."""
    embedding, head = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
    outside = {id(embedding.weight), id(head.weight)}
    dense = [p for p in loaded.model.parameters() if id(p) not in outside]
    every = [loaded.weights(layer, e) for layer, n in enumerate(loaded.n_experts) for e in range(n)]
    return Sizes(
        n_layers=len(loaded.n_experts),
        dtype=str(head.weight.dtype).removeprefix("torch."),
        weight_bytes=head.weight.itemsize,
        visited=loaded.top_k * len(loaded.n_experts) / sum(loaded.n_experts),
        expert_bytes=sum(weights.nbytes for weights in every),
        dense_bytes=sum(p.nbytes for p in dense),
        head_bytes=head.weight.nbytes,
        expert_shapes=tuple((m.shape[0], m.shape[1]) for m in (*every[0].up, every[0].down)),
        dense_shapes=tuple((p.shape[0], p.shape[1]) for p in dense if p.dim() == 2),
        head_shape=(head.weight.shape[0], head.weight.shape[1]),
    )


def of(size: Sizes, results: Results, gbs: float, flop_per_s: float) -> Limit:
    """Return what a workload asks at the least of whoever runs it; each visited expert is read once a step."""
    per_token = (size.dense_bytes + size.expert_bytes * size.visited) / size.weight_bytes
    expert = median(step.expert_bytes for step in results.steps) if results.steps else 0.0
    head = size.head_bytes / size.weight_bytes  # of a prompt, its last row alone
    return Limit(
        step_bytes=expert + size.dense_bytes + size.head_bytes,
        prompt_flop=2.0 * (results.workload.n_input * per_token + head),
        gbs=gbs,
        flop_per_s=flop_per_s,
    )


def alone_gbs(asked: Sequence[Results]) -> dict[str, Spread]:
    """Return the GB/s of experts' kernels alone, step by step: one more way to read, and often the fastest."""
    taken = [pair for results in asked for pair in zip(results.steps, results.alone_s, strict=True)]
    rates = [step.expert_bytes / seconds / 1e9 for step, seconds in taken]
    return {"experts' kernels alone": Spread.of(rates)} if rates else {}


def parts(size: Sizes, ceiling: float, results: Results, set_bytes: int) -> list[Part]:
    """Set each part's GB/s, the median over a workload's decoding steps, beside its limits."""
    steps, n_sequences = results.steps, results.workload.n_sequences
    dtype = getattr(torch, size.dtype)
    n_rows = max(1, round(sum(step.n_visits for step in steps) / sum(step.n_loads for step in steps)))
    n_bytes = median(step.expert_bytes for step in steps)
    reached = {
        "experts, kernels alone": (median(results.alone_s), n_bytes, size.expert_shapes, n_rows),
        "experts, in the lane": (median(s.kernels_s for s in steps), n_bytes, size.expert_shapes, n_rows),
        "experts, whole call": (median(s.experts_s for s in steps), n_bytes, size.expert_shapes, n_rows),
        "attention, router, norms": (
            median(s.dense_s for s in steps),
            size.dense_bytes,
            size.dense_shapes,
            n_sequences,
        ),
        "output layer": (median(s.head_s for s in steps), size.head_bytes, (size.head_shape,), n_sequences),
    }
    attainable = {
        key: attainable_gbs(key[0], key[1], set_bytes, PASSES, dtype)
        for key in {(shapes, rows) for _, _, shapes, rows in reached.values()}
    }
    made = []
    for name, (seconds, n_read, shapes, rows) in reached.items():
        gbs, limit = n_read / seconds / 1e9, attainable[shapes, rows]
        made.append(Part(name, n_sequences, seconds * 1e3, gbs, limit, gbs / limit, gbs / ceiling))
    return made


def overhead(size: Sizes, results: Results) -> Overhead:
    """Return where a decoding step's time goes beside the weights, in microseconds.

    Per layer: the time inside the call for experts less that of the same experts' kernels alone. The dense part
    runs in between, cold, as it does in a whole model; a run without experts would find it in the caches.
    """
    n, steps, alone_s = size.n_layers, results.steps, results.alone_s
    return Overhead(
        n_sequences=results.workload.n_sequences,
        per_layer_us=median(s.experts_s - a for s, a in zip(steps, alone_s, strict=True)) / n * 1e6,
        routing_us=median(s.experts_s - s.kernels_s for s in steps) / n * 1e6,
        kernels_us=median(s.kernels_s - a for s, a in zip(steps, alone_s, strict=True)) / n * 1e6,
        per_step_us=median(s.total_s - s.forward_s for s in steps) * 1e6,
    )
