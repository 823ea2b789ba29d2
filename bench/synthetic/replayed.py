"""Routing replayed in a model of random weights: whom its tokens visit is what tokens of a real model visited.

Routers without training send tokens anywhere; how popular experts are, and how soon they are visited again, is what
caches and copies live by. So the experts modules get the choice of a recording in place of their routers', whose
work is done all the same. What a look-ahead from the layer before is told comes from the recording too: asked of a
random router it would be right by chance, and of the replayed choice always.

Sequences are numbered as they first come to run, and number `s` replays recording `s` of the trace, by the position
of each token, from its beginning again where it is too short. A look-up is a gather in a table on the model's
device, from positions that lie there: nothing in it waits, and a recorded graph replays it.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from greenlet import getcurrent
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.synthetic.shapes import Shape
from fiddler.errors import ConfigError
from fiddler.lab.synthetic import PUBLISHED, SyntheticRouting
from fiddler.lab.traces import load
from fiddler.models.attention import CapturedCache
from fiddler.models.kv import KvArena, SequenceKV, WaveCache
from fiddler.models.seam import ExpertsModule, Forward
from fiddler.recording import Recording, RoutingTrace, guesses

DEMO = Path(__file__).resolve().parents[1] / "traces" / "demo.safetensors"
"""Recorded with the demo model, whose layers and experts the tiny shape has."""
Step = WaveCache | CapturedCache
"""What tells one forward from another, and whose rows it has."""


class Replay(nn.Module):
    """The tables of a trace, as a part of the model that uses them: they go where it goes."""

    experts: Tensor  # int16 [L, N, K]
    ahead: Tensor  # int16 [L, N, K]
    weights: Tensor | None  # float16 [L, N, K]
    starts: Tensor  # int64 [S], where each recording begins in N
    lengths: Tensor  # int64 [S]
    falling: Tensor  # float32 [K]
    number_at: Tensor  # int64, by where its run begins in the arena, the number of each sequence

    def __init__(self, trace: RoutingTrace, n_experts: Sequence[int], top_k: int) -> None:
        """Take a trace for a model of so many experts by layer; where it has fewer layers, they repeat.

        Raises `ConfigError` for a trace of a model whose layers are of another kind.
        """
        super().__init__()
        recordings = [recording for recording in trace.recordings if len(recording.experts)]
        _check(trace, recordings, n_experts, top_k)
        lengths = [len(recording.experts) for recording in recordings]
        tables: dict[str, Tensor | None] = {
            "experts": _table([recording.experts for recording in recordings]),
            "ahead": _table([_ahead(recording, seed) for seed, recording in enumerate(recordings)]),
            "weights": _table([r.weights for r in recordings if r.weights is not None]),
            "starts": torch.tensor([0, *lengths[:-1]]).cumsum(0),
            "lengths": torch.tensor(lengths),
            # A look-ahead's guesses are ranked by weight: they stay in the recording's order.
            "falling": torch.linspace(1.0, 0.5, top_k),
            "number_at": torch.zeros(1, dtype=torch.int64),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        self._n_layers, self._n_recordings = len(trace.n_experts), len(recordings)
        self._arena: KvArena | None = None
        self._rows: WeakKeyDictionary[Step, Tensor] = WeakKeyDictionary()
        self._latest: Tensor | None = None
        self.restart()

    def install(self, model: nn.Module, modules: Sequence[ExpertsModule]) -> None:
        """Become a part of `model`, whose experts modules are `modules` in layer order."""
        model.add_module("replayed_routing", self)
        model.register_forward_pre_hook(self._note, with_kwargs=True)
        for layer, module in enumerate(modules):
            kind: Any = type(module)
            module.__class__ = _replaying(kind)  # not a hook, which would take torch's slow way to every call
            module._replayed = self, layer

    def restart(self) -> None:
        """Number sequences from 0 again, as for another engine that opens the same model."""
        self._numbers: WeakKeyDictionary[SequenceKV, int] = WeakKeyDictionary()
        self._n_known = 0

    def visits(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return what replaces a router's `index` and `weights`, `[T, K]`, for the rows of the current forward."""
        forward = getcurrent()
        step = getattr(forward, "wave", None)
        layer %= self._n_layers
        if isinstance(step, Step):
            rows = self._latest = self._rows[step]
            given = weights if self.weights is None else self.weights[layer][rows].to(weights.dtype)
            return self.experts[layer][rows].to(index.dtype), given
        if isinstance(forward, Forward) and self._latest is not None:  # a look-ahead, by the forward that came last
            rows = self._latest[: len(hidden)]
            return self.ahead[layer][rows].to(index.dtype), self.falling.to(weights.dtype).expand(len(rows), -1)
        return index, weights  # a forward that nobody drives

    def _note(self, _model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Find, once a forward, where in the tables each of its rows is, `[T]`."""
        step = kwargs.get("past_key_values")
        if isinstance(step, Step):
            positions = kwargs["position_ids"][0]
            numbers = self._numbers_of(step, positions.device)
            self._rows[step] = self.starts[numbers] + positions % self.lengths[numbers]

    def _numbers_of(self, step: Step, device: torch.device) -> Tensor:
        """Return the recording of each row, `[T]`."""
        if isinstance(step, CapturedCache):
            return self.number_at[step._inputs.starts]
        each = [self._number(sequence) for sequence in step.sequences]
        rows = torch.tensor([n for n, n_rows in zip(each, step.lengths, strict=True) for _ in range(n_rows)])
        return rows if device.type == "cpu" else rows.pin_memory().to(device, non_blocking=True)

    def _number(self, sequence: SequenceKV) -> int:
        """Return the recording of a sequence. Recorded steps find it by where the sequence lies in the arena."""
        if sequence.run is not None and sequence.run.arena is not self._arena:
            self._arena = sequence.run.arena
            self.number_at = self.number_at.new_zeros(self._arena.n_tokens + 1)
            self.restart()  # what came before was no request, but the engine taking measure
        number = self._numbers.get(sequence)
        if number is None:
            number = self._numbers[sequence] = self._n_known % self._n_recordings
            self._n_known += 1
            if sequence.run is not None:
                self.number_at[sequence.run.start] = number
        return number


@lru_cache
def _replaying(cls: type) -> type:
    """Return a class of experts that visit whom a `Replay` says."""

    def forward(self: ExpertsModule, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        replay, layer = self._replayed
        output: Tensor = cls.forward(self, hidden, *replay.visits(layer, hidden, index, weights))  # type: ignore[attr-defined]
        return output

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _check(trace: RoutingTrace, recordings: Sequence[Recording], n_experts: Sequence[int], top_k: int) -> None:
    kinds, wanted = set(trace.n_experts), set(n_experts)
    widths = {recording.experts.shape[2] for recording in recordings}
    if not recordings or kinds != wanted or len(kinds) != 1 or widths != {top_k}:
        raise ConfigError(
            f"the routing is of {len(recordings)} sequences that visit {sorted(widths)} of {sorted(kinds)} "
            f"experts in {trace.model or 'a model'}; this one visits {top_k} of {sorted(wanted)}"
        )
    if len({recording.weights is None for recording in recordings}) > 1:
        raise ConfigError("some sequences of the routing have weights and some have not: all must, or none")


def _ahead(recording: Recording, seed: int) -> NDArray[np.int16]:
    return guesses(recording.experts, seed=seed) if recording.ahead is None else recording.ahead


def _table(parts: Sequence[NDArray[Any]]) -> Tensor | None:
    """Return recordings `[T, L, K]`, one after the other, as one table `[L, N, K]`; `None` without any."""
    if not parts:
        return None
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(list(parts)).swapaxes(0, 1)))


def recorded(file: Path = DEMO) -> RoutingTrace:
    """Read a recording (`fiddler.lab.traces`). Raises `ConfigError`."""
    return load(file)


def drawn(shape: Shape, n_sequences: int, n_tokens: int) -> RoutingTrace:
    """Draw sequences of so many tokens for a shape, with a made-up look-ahead.

    Experts are as popular and recur as often as in published replays of other models.
    """
    sizes = shape.sizes
    made = SyntheticRouting(sizes.n_layers, sizes.n_experts, sizes.top_k, PUBLISHED)
    sequences = [made.sequence(number, n_tokens) for number in range(n_sequences)]
    recordings = (Recording(str(i), 0, rows, ahead=guesses(rows, seed=i)) for i, rows in enumerate(sequences))
    return RoutingTrace(shape.name, (sizes.n_experts,) * sizes.n_layers, tuple(recordings))
