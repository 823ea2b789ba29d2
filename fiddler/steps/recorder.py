"""Records where the model sent each token; the only owner of recorded routing.

A wave records its layers as it passes them. Its rows join their sequences once the step has succeeded, so a failed
step leaves nothing behind and no token is recorded twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fiddler.recording import Recording, RoutingTrace


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """Tokens and their visits, each array `[T, L, K]`; in `experts` and `ahead` -1 stands for no expert."""

    experts: NDArray[np.int16]
    weights: NDArray[np.float16]
    ahead: NDArray[np.int16]

    def part(self, start: int, stop: int) -> "Routed":
        """Return the tokens from `start` to `stop`."""
        return Routed(self.experts[start:stop], self.weights[start:stop], self.ahead[start:stop])


class _Table:
    """Rows by layer, of as many columns as the layer has; `blank` where none was put."""

    def __init__(self, n_tokens: int, blank: int, dtype: type[np.int16 | np.float16]) -> None:
        self._n_tokens = n_tokens
        self._blank = blank
        self._dtype = dtype
        self._layers: dict[int, NDArray[Any]] = {}

    def put(self, layer: int, at: NDArray[np.intp], rows: NDArray[Any]) -> None:
        """Take a layer's rows `[t, k]` as those at the positions `at` `[t]`."""
        if layer not in self._layers:
            self._layers[layer] = np.full((self._n_tokens, rows.shape[1]), self._blank, self._dtype)
        self._layers[layer][at] = rows

    @property
    def width(self) -> int:
        """Columns of the widest layer."""
        return max((rows.shape[1] for rows in self._layers.values()), default=1)

    def whole(self, n_layers: int, width: int) -> NDArray[Any]:
        """Return all rows, `[T, L, width]`."""
        made = np.full((self._n_tokens, n_layers, width), self._blank, self._dtype)
        for layer, rows in self._layers.items():
            made[:, layer, : rows.shape[1]] = rows
        return made


class WaveRecord:
    """One wave's rows, in the order of its forwards, which have `n_rows` each."""

    def __init__(self, n_rows: Sequence[int], n_experts: Sequence[int]) -> None:
        self._bounds = list(pairwise(accumulate(n_rows, initial=0)))
        self._n_experts = n_experts
        n_tokens = sum(n_rows)
        self._experts = _Table(n_tokens, -1, np.int16)
        self._weights = _Table(n_tokens, 0, np.float16)
        self._ahead = _Table(n_tokens, -1, np.int16)

    def visit(self, layer: int, index: Tensor, weights: Tensor, meeting: Sequence[int]) -> None:
        """Record a layer's visits, `[t, k]`, for the rows of the forwards `meeting`, without those of weight
        zero.
        """
        visited, given, at = index.numpy(), weights.float().numpy(), self._at(meeting)
        real = (visited >= 0) & (visited < self._n_experts[layer]) & (given != 0.0)
        self._experts.put(layer, at, np.where(real, visited, -1))
        self._weights.put(layer, at, np.where(real, given, 0.0))

    def expect(self, layer: int, index: Tensor, meeting: Sequence[int]) -> None:
        """Write down which experts `[t, k]` of `layer` are expected for the rows of the forwards `meeting`."""
        expected = index.numpy()
        real = (expected >= 0) & (expected < self._n_experts[layer])
        self._ahead.put(layer, self._at(meeting), np.where(real, expected, -1))

    def rows(self) -> Routed:
        """Return all rows; a layer that a forward did not pass has no visits."""
        n_layers, width = len(self._n_experts), max(self._experts.width, self._ahead.width)
        experts, weights, ahead = (t.whole(n_layers, width) for t in (self._experts, self._weights, self._ahead))
        return Routed(experts, weights, ahead)

    def _at(self, meeting: Sequence[int]) -> NDArray[np.intp]:
        return np.concatenate([np.arange(*self._bounds[forward]) for forward in meeting])


@dataclass(slots=True, eq=False)
class SequenceRecord:
    """One request's rows so far, a part for each step."""

    name: str
    n_prompt: int
    parts: list[Routed]


class Recorder:
    """The routing of all requests of an engine. The engine's thread writes; any thread may take a copy."""

    def __init__(self, n_experts: tuple[int, ...]) -> None:
        self._n_experts = n_experts
        self._sequences: list[SequenceRecord] = []

    def open(self, n_prompt: int) -> SequenceRecord:
        """Return a record for the next request, which is named by its number."""
        sequence = SequenceRecord(str(len(self._sequences)), n_prompt, [])
        self._sequences.append(sequence)
        return sequence

    def wave(self, n_rows: Sequence[int]) -> WaveRecord:
        """Return a record for a wave of forwards of `n_rows` each."""
        return WaveRecord(n_rows, self._n_experts)

    def trace(self, model: str) -> RoutingTrace:
        """Return the recordings so far, of requests that have run at least one token."""
        found = [(s.name, s.n_prompt, parts) for s in list(self._sequences) if (parts := list(s.parts))]
        every = [part for _, _, parts in found for part in parts]
        width = max((part.experts.shape[2] for part in every), default=1)
        ahead = any((part.ahead >= 0).any() for part in every)
        return RoutingTrace(model, self._n_experts, tuple(_recording(*one, width, ahead=ahead) for one in found))


def _recording(name: str, n_prompt: int, parts: Sequence[Routed], width: int, *, ahead: bool) -> Recording:
    experts = _joined([part.experts for part in parts], width, -1)
    return Recording(
        name,
        min(n_prompt, len(experts)),
        experts,
        _joined([part.weights for part in parts], width, 0),
        _joined([part.ahead for part in parts], width, -1) if ahead else None,
    )


def _joined(parts: Sequence[NDArray[Any]], width: int, blank: int) -> NDArray[Any]:
    """Return a read-only copy of parts `[t, L, k]`, one after the other, as `[T, L, K]`."""
    made = np.full((sum(map(len, parts)), parts[0].shape[1], width), blank, parts[0].dtype)
    start = 0
    for part in parts:
        made[start : start + len(part), :, : part.shape[2]] = part
        start += len(part)
    made.flags.writeable = False
    return made
