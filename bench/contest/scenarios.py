"""What `bench.latency` asks of every system, as workloads."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from bench.contest.workload import Workload

SCENARIOS = {
    "single": "one sequence: a prompt, then tokens one by one",
    "concurrent": "several sequences at once, started together",
    "prefill": "one prompt to its first token",
    "beam": "one sequence by beam search, through transformers' generate() over either system's experts",
}
"""By name, what it is."""
LENGTHS = {"single": (64, 64), "concurrent": (64, 64), "prefill": (512, 1), "beam": (32, 32)}
"""Tokens in and out, unless told."""
PAPER = ((32, 64, 128, 256, 512), (64, 128, 256))
"""`--input-tokens paper`, `--output-tokens paper`: the original Fiddler's grid, see `fifteen` in world.json."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long and how many; empty lengths are the scenario's own."""

    n_input: tuple[int, ...] = ()
    n_output: tuple[int, ...] = ()
    concurrency: tuple[int, ...] = (8,)
    beams: tuple[int, ...] = (4,)


def workloads(scenario: str, sizes: Sizes, n_vocabulary: int) -> list[Workload]:
    """Return everything that a scenario asks."""
    n_input, n_output = LENGTHS[scenario]
    if scenario == "prefill":
        lengths = product(sizes.n_input or (n_input,), (1,))
    else:
        lengths = product(sizes.n_input or (n_input,), sizes.n_output or (n_output,))
    one = [Workload(1, inputs, outputs, n_vocabulary) for inputs, outputs in lengths]
    return list(_VARIED.get(scenario, lambda found, _: iter(found))(one, sizes))


def _concurrent(one: Sequence[Workload], sizes: Sizes) -> Iterator[Workload]:
    return (replace(workload, n_sequences=n) for workload in one for n in sizes.concurrency)


def _beams(one: Sequence[Workload], sizes: Sizes) -> Iterator[Workload]:
    return (replace(workload, n_beams=n) for workload in one for n in sizes.beams)


_VARIED: dict[str, Callable[[Sequence[Workload], Sizes], Iterator[Workload]]] = {
    "concurrent": _concurrent,
    "beam": _beams,
}
