"""A forward without a model: waves that visit the experts a routing says, and do nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fiddler.engine.assemble import Span
from fiddler.scheduler.messages import LayerDone, LayerReady
from fiddler.scheduler.routing import route

Routing = NDArray[np.int16]
"""Experts by token, layer and choice, `[T, L, K]`."""


@dataclass(slots=True, eq=False)
class Script:
    """One sequence: a prompt of `n_prompt` tokens, then one token a step, as its routing goes on."""

    routing: Routing
    n_prompt: int
    n_past: int = 0

    @property
    def prefilling(self) -> bool:
        """Whether part of the prompt has not been run yet."""
        return self.n_past < self.n_prompt

    @property
    def finished(self) -> bool:
        """Whether all of it has been run."""
        return self.n_past >= len(self.routing)


class ScriptWave:
    """Rows of some sequences on their way through the layers."""

    def __init__(self, spans: Sequence[Span[Script]], n_experts: tuple[int, ...]) -> None:
        self.n_rows = sum(span.n_rows for span in spans)
        self.n_context = sum(span.stop for span in spans)
        self.error: Exception | None = None
        self.failed: list[LayerDone] = []
        """Layers in which experts failed."""
        self._rows = np.concatenate([span.request.routing[span.start : span.stop] for span in spans])
        self._n_experts = n_experts
        self._layer = -1

    @property
    def at_end(self) -> bool:
        """Whether its last layer's experts were asked for: the output head comes next."""
        return self._layer + 1 == len(self._n_experts)

    def advance(self, wave: int) -> LayerReady | None:
        """Go to the next layer; `None` after the last."""
        self._layer += 1
        if self._layer == len(self._n_experts):
            return None
        visits = self._rows[:, self._layer]  # [T, K]
        work = route(self._layer, visits.ravel().tolist(), self._n_experts[self._layer])
        return LayerReady(wave, work, *visits.shape)

    def take(self, done: LayerDone) -> None:
        """Note what failed."""
        if done.failures:
            self.failed.append(done)

    def end(self, error: Exception | None) -> None:
        """Note what ended it early."""
        self.error = error
