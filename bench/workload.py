"""What a latency run asks for, and what it observes."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any


@dataclass(frozen=True, slots=True)
class Workload:
    """Some sequences of equal length, started together."""

    n_sequences: int
    n_input: int
    n_output: int
    n_vocabulary: int
    n_beams: int = 1
    """Above 1: beam search with so many beams a sequence."""

    def prompts(self, seed: int) -> list[list[int]]:
        """Return seeded random token ids: random weights have no tokenizer, and timing does not need one."""
        source = random.Random(f"{seed} {self.n_sequences}")
        return [[source.randrange(self.n_vocabulary) for _ in range(self.n_input)] for _ in range(self.n_sequences)]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a workload by one system."""

    first_token_s: float | None
    """Until every sequence has its first token; `None` where the system could not run the prompt by itself."""
    decode_s: float
    """From the first token to the last."""
    n_sequences: int
    n_output: int
    """Tokens made by each sequence: fewer than asked for where the bench lost its patience."""
    tokens: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    """Made tokens by sequence."""

    @property
    def tokens_per_s(self) -> float | None:
        """All made tokens over the whole time, the prompt included."""
        if self.first_token_s is None:
            return None
        return self.n_sequences * self.n_output / (self.first_token_s + self.decode_s)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after each sequence's first, over the time after it; `None` where there is none."""
        return self.n_sequences * (self.n_output - 1) / self.decode_s if self.n_output > 1 else None


class UnavailableError(Exception):
    """A system that cannot run a workload; says why."""


@dataclass(slots=True)
class Step:
    """One step of the engine, taken apart; seconds."""

    n_rows: int
    """Rows of all sequences: tokens of prompts, or one per decoding sequence."""
    total_s: float = 0.0
    forward_s: float = 0.0
    """In the model's forward, experts included."""
    experts_s: float = 0.0
    """In calls for experts: routing, kernels and combining."""
    kernels_s: float = 0.0
    """In the lane's expert compute alone."""
    head_s: float = 0.0
    """In the output layer."""
    expert_bytes: int = 0
    n_loads: int = 0
    n_visits: int = 0
    """Of rows to experts."""
    calls: list[Any] = field(default_factory=list, repr=False)
    """Inputs `(layer, hidden [T, H], index [T, K])` of the calls for experts, to run their kernels again alone."""

    @property
    def dense_s(self) -> float:
        """Forward time that is neither experts nor output layer."""
        return self.forward_s - self.experts_s - self.head_s


def decoding(steps: Sequence[Step], n_sequences: int) -> list[Step]:
    """Return the steps in which every sequence decoded; the first is left out, it still warms caches up."""
    return [step for step in steps if step.n_rows == n_sequences][1:]


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
    many = {"concurrent": sizes.concurrency}.get(scenario, (1,))
    beams = {"beam": sizes.beams}.get(scenario, (1,))
    return [
        Workload(n, inputs, outputs, n_vocabulary, n_beams)
        for inputs, outputs in lengths
        for n in many
        for n_beams in beams
    ]
