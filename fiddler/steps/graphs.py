"""Records decoding steps as GPU graphs, in pieces from one experts call to the next; a replay runs no model code.

A graph is for a number of rows and a length of pasts, each up to a power of two, and for one of a step's two waves,
which never share graph memory. Steps that cannot be recorded run as before, and the log says why. So does the first
step of a kind, since most kinds are met once.

Where every expert is in a slot, nothing is left to decide: the routing stays on the GPU (`Resident`), and a
decoding step is one recorded piece from its tokens to its logits.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fiddler.errors import UnsupportedModelError
from fiddler.gpu.crossing import blank_visits, noted
from fiddler.gpu.device import Gpu, Graph
from fiddler.gpu.slots import SlotExperts
from fiddler.gpu.visits import Visits
from fiddler.lanes.experts import Ask, LaneCounters, Own, summed
from fiddler.models.attention import CapturedCache, Row, StaticInputs, step_numbers
from fiddler.models.kv import KvArena
from fiddler.models.lookahead import Lookahead
from fiddler.models.seam import ExpertsCall, Forward


@dataclass(frozen=True, slots=True)
class Resident:
    """Runs layers without the host, if the kernels do not need it either."""

    experts: SlotExperts
    slots: Callable[[int], Tensor]
    """By layer, the slots of its experts, int32 `[E]` on the GPU; they stay as they are."""
    counters: LaneCounters
    """Counters of visits; the host does not learn which experts they are of."""

    def runs(self, layer: int, hidden: Tensor) -> bool:
        """Whether it runs a layer for rows `[T, H]`."""
        return self.experts.blind(layer, hidden.shape[0], hidden)

    def __call__(self, ask: Ask) -> Tensor:
        """Queue a layer; returns its output `[T, H]`. Visits of no expert, or of weight zero, add nothing."""
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


logger = logging.getLogger("fiddler")

LEAST_TOKENS = 256
"""The smallest bucket of pasts."""
MOST_ROWS = 64
"""Steps of more rows are not recorded: beside their experts, launches are nothing."""
MOST_TOKENS = 1 << 15
"""Rows times bucket: attention gathers this many tokens of keys and values in each layer. As many as a GPU holds
unless told; one long sequence beside many short ones is faster if each attends by itself."""

Kind = tuple[int, int, int, bool]
"""(wave of the step, rows, bucket, whether every expert is in a slot)."""


def bucket(n: int, least: int = 1) -> int:
    """Return the power of two, of at least `least`, that is not below `n`."""
    return max(least, 1 << (n - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Segment:
    """A recorded piece: its launches, and then its experts request or, at the end, the logits `[n, V]`."""

    graph: Graph
    outcome: Ask | Tensor


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded step of one kind; `keeps` holds the owners of its memory."""

    inputs: StaticInputs
    segments: tuple[Segment, ...]
    n_blind: int
    """Visits of a row, over all layers, that the host does not learn of."""
    keeps: Any


class Replay:
    """A recorded step that is being replayed, driven like a `Forward`."""

    dead = False

    def __init__(self, recorded: Recorded, n_rows: int) -> None:
        self._segments = iter(recorded.segments)
        self._n_rows = n_rows

    def send(self, output: Tensor | None = None) -> Ask | Tensor:
        """Queue the next piece, which begins by summing up the experts' results."""
        segment = next(self._segments)
        segment.graph.replay()
        if isinstance(segment.outcome, Tensor):
            self.dead = True
            return segment.outcome[: self._n_rows]
        assert segment.outcome.own is not None
        return segment.outcome._replace(own=segment.outcome.own._replace(n_rows=self._n_rows))

    def close(self) -> None:
        """Nothing has to be unwound."""
        self.dead = True


@contextmanager
def _uncollected() -> Iterator[None]:
    """Collect no garbage: pinned memory in it would be freed with an event on a stream that is being captured."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _nobody() -> None:
    return


@dataclass(slots=True)
class Graphs:
    """Owner of all recorded steps of a model."""

    model: Callable[..., Any]
    gpu: Gpu
    arena: KvArena
    n_visits: int
    """Visits of a row, over all layers."""
    why_not: str = ""
    """Why nothing is recorded any more; empty while it is."""
    lookahead: Lookahead | None = None
    """Asks the next layer's router early, within a piece."""
    resident: Callable[[], Resident | None] = _nobody
    """Runs layers without the host while every expert is in a slot."""
    whole: bool = False
    """Whether layers transform the past before they attend to it; found out by trying."""
    kinds: dict[Kind, Recorded | None] = field(default_factory=dict)
    """Recorded steps by kind; `None` for a kind that was met once."""
    too_large: set[Kind] = field(default_factory=set)
    """Kinds whose recording did not fit into memory."""
    pools: dict[int, object] = field(default_factory=dict)
    """Graph memory by wave of a step."""

    def replay(self, wave: int, rows: Sequence[Row]) -> Replay | None:
        """Return a step of these rows, or `None` where there is no recording; `wave` is its number in the step."""
        if self.why_not or len(rows) > MOST_ROWS:
            return None
        resident, n_tokens = self.resident(), max(row.position for row in rows) + 1
        kind = wave, bucket(len(rows)), bucket(n_tokens, LEAST_TOKENS), resident is not None
        if kind[1] * kind[2] > MOST_TOKENS or kind in self.too_large:
            return None
        if kind not in self.kinds:
            self.kinds[kind] = None
            return None
        recorded = self.kinds[kind]
        if recorded is None:
            recorded = self.kinds[kind] = self._tried(kind)
        if recorded is None:
            return None
        numbers = self.gpu.pinned(4, kind[1], dtype=torch.int64)
        numbers.copy_(step_numbers(self.arena, rows, kind[1]))
        self.gpu.main.run(partial(recorded.inputs.numbers.copy_, numbers, non_blocking=True))
        if resident is not None:
            resident.counters.n_rows += len(rows) * recorded.n_blind
        return Replay(recorded, len(rows))

    def forget(self) -> None:
        """Give back the memory of recorded steps; kinds that are met again are recorded again."""
        self.kinds.clear()
        self.too_large.clear()
        self.pools.clear()

    def _tried(self, kind: Kind) -> Recorded | None:
        try:
            return self._record(kind)
        except torch.OutOfMemoryError as error:
            self.too_large.add(kind)
            logger.warning("decoding of kind %s runs without a graph, for want of memory: %s", kind, error)
            return None
        except Exception as error:  # whatever a model does that cannot be recorded
            self.why_not = f"{type(error).__name__}: {error}"
        self.kinds.clear()
        logger.warning("decoding runs without graphs: %s", self.why_not)
        return None

    def _record(self, kind: Kind) -> Recorded:
        """Run a step of a kind on no sequence, so that all it needs is loaded, and record another."""
        wave, n_rows, n_tokens, _ = kind
        inputs = StaticInputs(step_numbers(self.arena, (), n_rows).to(self.gpu.device))
        pool = self.pools.setdefault(wave, self.gpu.pool())
        try:
            self._rehearse(inputs, n_tokens)
        except UnsupportedModelError:
            self.whole = True
            self._rehearse(inputs, n_tokens)
        forward, graphs = self._forward(inputs, n_tokens), list[Graph]()

        def capture(work: Callable[[], Any]) -> Any:
            graph, outcome = self.gpu.capture(pool, work)
            graphs.append(graph)
            return outcome

        with _uncollected():
            outcomes = list(self._pieces(forward, capture))
        segments = tuple(map(Segment, graphs, outcomes))
        n_heard = sum(ask.index.shape[1] for ask in outcomes if isinstance(ask, Ask))
        return Recorded(inputs, segments, self.n_visits - n_heard, forward)

    def _rehearse(self, inputs: StaticInputs, n_tokens: int) -> None:
        for _ in self._pieces(self._forward(inputs, n_tokens), self.gpu.launch):
            pass

    def _forward(self, inputs: StaticInputs, n_tokens: int) -> Forward:
        cache = CapturedCache(self.arena, inputs, n_tokens, whole=self.whole)

        def run() -> Tensor:
            output = self.model(
                input_ids=inputs.ids, position_ids=inputs.positions, past_key_values=cache, use_cache=True
            )
            logits: Tensor = output.logits[0]
            return logits

        forward = Forward(run)
        forward.wave = cache
        return forward

    def _pieces(self, forward: Forward, launch: Callable[[Callable[[], Any]], Any]) -> Iterator[Ask | Tensor]:
        """Run a forward piece by piece, each within `launch`; yields the request of each piece, and the logits."""
        ask: Ask | None = None
        try:
            while not forward.dead:
                outcome = launch(partial(self._piece, forward, ask))
                yield outcome
                ask = outcome if isinstance(outcome, Ask) else None
        finally:
            forward.close()

    def _piece(self, forward: Forward, before: Ask | None) -> Ask | Tensor:
        """Sum up the experts' results, run on to the next request, and make the host's tensors for it."""
        output, resident = None, self.resident()
        if before is not None:
            assert before.own is not None
            output = summed(before.own.visits, before.weights)
        while True:
            call: ExpertsCall | Tensor = forward.send(output)
            if isinstance(call, Tensor):
                return call
            if resident is None or not resident.runs(call.layer, call.hidden):
                break
            output = resident(Ask(*call, None))
        ahead = self.lookahead.expects(call.layer, call.hidden) if self.lookahead is not None else None
        ask = Ask(*call, ahead)
        return ask._replace(own=Own(len(call.index), noted(ask), blank_visits(ask)))
