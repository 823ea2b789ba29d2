"""Waves without a model: they visit the experts of a recorded routing, and compute nothing."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fiddler.cache.policy import Rows
from fiddler.lanes.runner import DrivenWave
from fiddler.recording import Recording
from fiddler.scheduler.layer import Layer
from fiddler.scheduler.messages import LayerDone
from fiddler.scheduler.routing import route
from fiddler.scheduler.waves import RowSpan


@dataclass(slots=True, eq=False)
class Script:
    """One sequence: its prompt, then one token a step, as it was recorded."""

    recording: Recording
    n_past: int = 0

    @property
    def prefilling(self) -> bool:
        """Whether part of the prompt has not been run yet."""
        return self.n_past < self.recording.n_prompt

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return self.recording.n_prompt

    @property
    def finished(self) -> bool:
        """Whether all of it has been run."""
        return self.n_past >= len(self.recording.experts)


class ScriptWave(DrivenWave):
    """Rows of some sequences on their way through the layers; `passed` is called after each."""

    def __init__(
        self,
        spans: Sequence[RowSpan[Script]],
        n_experts: tuple[int, ...],
        passed: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._passed = passed
        self.n_rows = sum(span.n_rows for span in spans)
        self.n_context = sum(span.stop for span in spans)
        self.error: BaseException | None = None
        self.failed: list[LayerDone] = []
        """Layers in which experts failed."""
        self._rows = _joined([(span, span.request.recording.experts) for span in spans])
        ahead = [(span, span.request.recording.ahead) for span in spans if span.request.recording.ahead is not None]
        self._ahead = _joined(ahead) if len(ahead) == len(spans) else None
        self._n_experts = n_experts
        self._layer = -1

    @property
    def at_end(self) -> bool:
        """Whether its last layer's experts were asked for: the output head comes next."""
        return self._layer + 1 == len(self._n_experts)

    def launch(self) -> None:
        """Do nothing: there is nothing to compute."""

    def advance(self) -> Layer | None:
        """Go to the next layer; `None` after the last."""
        self._layer += 1
        if self._layer == len(self._n_experts):
            return None
        visits = self._rows[:, self._layer]  # [T, K]
        n_tokens, top_k = visits.shape
        work = route(self._layer, visits.ravel().tolist(), self._n_experts[self._layer], n_tokens=n_tokens)
        return Layer(self, work, n_tokens, top_k, ahead=self._expected())

    def _expected(self) -> Rows:
        """Return the look-ahead's guesses for the next layer, most rows first, then the likeliest of each token."""
        if self._ahead is None or self.at_end:
            return ()
        rows = Counter(self._ahead[:, self._layer + 1].T.ravel().tolist())
        del rows[-1]
        return rows.most_common()

    def take(self, done: LayerDone) -> None:
        """Record failures."""
        self._passed()
        if done.failures:
            self.failed.append(done)

    def end(self, error: BaseException | None) -> None:
        """Record the error that ended the wave early."""
        self.error = error


def _joined(parts: Sequence[tuple[RowSpan[Script], NDArray[np.int16]]]) -> NDArray[np.int16]:
    """Return the rows of some spans, `[ΣT, L, K]`."""
    return np.concatenate([rows[span.start : span.stop] for span, rows in parts])
