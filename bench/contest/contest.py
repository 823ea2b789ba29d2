"""Fiddler and its peers on one checkpoint, in turns, so that whatever else the machine does hits all alike."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import torch

import fiddler
from bench.contest import ours
from bench.contest.rates import OURS, Results, speed
from bench.peers import forwards
from bench.peers.known import open_peer
from bench.peers.peer import Peer
from bench.workload import Run, UnavailableError, Workload, decoding
from fiddler import Engine, EngineConfig

T = TypeVar("T")
WARM_UP_TOKENS = 4
PATIENCE_S = 10.0
"""A peer that is slow decodes so long in a turn, and its rate is of the tokens it made."""


@dataclass(slots=True)
class Contest:
    """Whoever takes part, opened."""

    engine: Engine
    folder: Path
    probe: ours.Probe | None
    """Where the engine's steps can be taken apart: on the CPU alone."""
    virtual: bool
    peers: dict[str, Peer] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Who does not take part, and why."""
    _search: Any = None
    """transformers' model over Fiddler's experts, for beam search."""

    @property
    def n_vocabulary(self) -> int:
        """Tokens to draw prompts from."""
        assert self.engine._loaded is not None
        embedding: Any = self.engine._loaded.model.get_input_embeddings()
        return int(embedding.num_embeddings)

    async def turn(self, results: Results, seed: int) -> None:
        """Let everybody run the workload once; turn 0 warms up, and is not counted."""
        workload = results.workload
        if seed == 0:
            workload = replace(workload, n_output=min(workload.n_output, WARM_UP_TOKENS))
        made = await self._ours(workload, seed)
        if seed:
            results.runs.setdefault(OURS, []).append(made)
            await self._take_apart(results)
        for name in self._order(seed):
            if name not in results.unavailable:
                await self._let(name, results, (workload, seed), made)
        results.unavailable |= self.missing

    def _order(self, seed: int) -> list[str]:
        """Return the peers in another order each turn. Fiddler is always first: it makes the tokens."""
        names, first = list(self.peers), seed % max(1, len(self.peers))
        return names[first:] + names[:first]

    async def _ours(self, workload: Workload, seed: int) -> Run:
        if workload.n_beams > 1 and self.probe is None:
            raise ValueError("beam search runs on the CPU alone: leave scenario beam out, or take device cpu")
        if self.virtual:
            return await ours.run_on_its_clock(self.engine, workload, seed)
        if self.probe is None:
            return await ours.run(self.engine, workload, seed)
        if workload.n_beams > 1:
            return await self.probe.call(lambda: self._searched(workload, seed))
        self.probe.steps.clear()
        return await ours.run(self.engine, workload, seed)

    def _searched(self, workload: Workload, seed: int) -> Run:
        if self._search is None:
            self._search = fiddler.attach(self.folder, self.engine.config)
        return forwards.run(self._search, workload, workload.prompts(seed), (), inf)

    async def _let(self, name: str, results: Results, asked: tuple[Workload, int], made: Run) -> None:
        """Let a peer run what was asked (a workload with a seed), unless it cannot."""
        (workload, seed), peer = asked, self.peers[name]
        patience_s = PATIENCE_S if workload.n_beams == 1 else inf  # a search is rated whole
        assert self.probe is not None
        try:
            run = await self.probe.call(
                _with_own_threads(lambda: peer.run(workload, workload.prompts(seed), made.tokens, patience_s))
            )
            if speed(run, results.scenario) is None:
                raise UnavailableError("cannot run the prompt by itself")
        except UnavailableError as error:
            results.unavailable[name] = str(error)
            results.runs.pop(name, None)
        else:
            if seed:
                results.runs.setdefault(name, []).append(run)

    async def _take_apart(self, results: Results) -> None:
        """Keep the steps in which every sequence decoded, and run their experts once more with nothing around."""
        if self.probe is None or results.scenario not in ("single", "concurrent"):
            return
        steps = decoding(self.probe.steps, results.workload.n_sequences)
        results.steps += steps
        results.alone_s += await self.probe.call(partial(ours.alone, self.probe, steps))
        for step in steps:
            step.calls.clear()  # gigabytes of rows otherwise, on a long run


@asynccontextmanager
async def contest(folder: Path, config: EngineConfig, peers: Sequence[str]) -> AsyncIterator[Contest]:
    """Open Fiddler and whichever of `peers` can be opened. Raises `ValueError` for a peer that there is not."""
    async with Engine(folder, config) as engine:
        assert engine._loaded is not None
        resolved = engine._loaded.resolved
        on_cpu = resolved.device == "cpu"
        found = Contest(engine, folder, ours.Probe(engine) if on_cpu else None, resolved.machine is not None)
        try:
            for name in peers:
                await _open(found, name)
            yield found
        finally:
            for peer in found.peers.values():
                peer.close()
            if found.probe is not None:
                found.probe.close()


async def _open(found: Contest, name: str) -> None:
    """Open a peer on the engine's thread, as many threads as the engine has."""
    if found.probe is None:
        found.missing[name] = "runs on the CPU alone, and this engine does not"
        return
    try:
        found.peers[name] = await found.probe.call(
            _with_own_threads(lambda: open_peer(name, found.folder, torch.get_num_threads()))
        )
    except UnavailableError as error:
        found.missing[name] = str(error)


def _with_own_threads(work: Callable[[], T]) -> Callable[[], T]:
    """Let a peer set this thread's torch threads, which are the engine's, for as long as it runs."""

    def run() -> T:
        n_threads = torch.get_num_threads()
        try:
            return work()
        finally:
            torch.set_num_threads(n_threads)

    return run
