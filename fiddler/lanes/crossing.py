"""Where rows cross from a model's forward to its experts, and results back.

On a GPU the forward may run behind the host: what it asks for is announced before it is computed, read once it is
there, and answered before the answer has been computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from fiddler.lanes.combine import combine, gather
from fiddler.lanes.experts import ExpertWork
from fiddler.scheduler.routing import LayerWork, Load


class Ask(NamedTuple):
    """A layer's rows and who is to visit whom; on the forward's device."""

    layer: int
    hidden: Tensor  # [T, H]
    index: Tensor  # type: ignore[assignment]  # [T, K]; a field, not tuple.index
    weights: Tensor  # [T, K]
    ahead: Tensor | None  # [T, K'], experts that a look-ahead expects in the next layer
    own: "Own | None" = None


class Own(NamedTuple):
    """What a forward on a GPU has made for its own ask, where it is replayed."""

    n_rows: int  # the first of its rows; the others count for nothing
    note: Tensor  # the routing as one tensor
    visits: Tensor  # [T·K, H] zeros, which the forward sums up itself


class Routing(NamedTuple):
    """What of an `Ask` the host has to know, in its memory."""

    index: Tensor  # type: ignore[assignment]  # [T, K]
    weights: Tensor  # [T, K]
    ahead: Tensor | None  # [T, K']


class Crossing(Protocol):
    """The layers on their way, by wave and layer. Its methods belong to the engine's thread."""

    def announce(self, wave: int, ask: Ask) -> None:
        """Take note that a wave's forward asks for a layer, computed or not."""
        ...

    def conclude(self, wave: int, results: Sequence[Tensor]) -> list[Tensor]:
        """Return what forwards have returned, in the host's memory once their dense part is reported."""
        ...

    def routing(self, wave: int, layer: int) -> Routing:
        """Return who visits whom. Not before the lanes have reported the dense part that ends in the layer."""
        ...

    def open(self, wave: int, work: LayerWork) -> None:
        """Let jobs of the layer begin."""
        ...

    def results(self, wave: int, layer: int, *, deferred: bool = False, failed: tuple[Load, ...] = ()) -> Tensor:
        """Return the weighted sums `[T, H]`, on the forward's device, of the layer's loads or of its deferred ones.

        Those that failed count as zero. The sums may be computed later, in the order of the forward's work.
        """
        ...

    def let_go(self, wave: int, layer: int) -> None:
        """Forget a layer; nothing happens if it is not known."""
        ...

    def end(self, wave: int) -> None:
        """Forget a wave whose layers were let go."""
        ...


@dataclass(slots=True)
class _Open:
    ask: Ask
    work: LayerWork | None = None

    @property
    def n_now(self) -> int:
        """Rows that join in this layer; the deferred follow."""
        assert self.work is not None
        return self.work.loads[-1].stop if self.work.loads else 0


@dataclass(frozen=True, slots=True)
class HostCrossing:
    """For forwards on the CPU: everything is there at once, and stays where it is."""

    experts: ExpertWork
    _layers: dict[tuple[int, int], _Open] = field(default_factory=dict)

    def announce(self, wave: int, ask: Ask) -> None:
        """Keep it: it is computed."""
        self._layers[wave, ask.layer] = _Open(ask)

    def conclude(self, wave: int, results: Sequence[Tensor]) -> list[Tensor]:
        """Return them: they are there."""
        return list(results)

    def routing(self, wave: int, layer: int) -> Routing:
        """Return what was asked."""
        return Routing(*self._layers[wave, layer].ask[2:5])

    def open(self, wave: int, work: LayerWork) -> None:
        """Group the rows by expert."""
        layer = self._layers[wave, work.layer]
        layer.work = work
        self.experts.open(wave, work.layer, gather(layer.ask.hidden, work, layer.ask.index.shape[1]))

    def results(self, wave: int, layer: int, *, deferred: bool = False, failed: tuple[Load, ...] = ()) -> Tensor:
        """Sum up, in routing order."""
        found = self._layers[wave, layer]
        work, ask = found.work, found.ask
        assert work is not None
        if not (work.deferred if deferred else work.loads):
            return ask.hidden.new_zeros(ask.hidden.shape)
        outputs = self.experts.results(wave, layer, failed)
        if not work.deferred:
            return combine(outputs, work.order, ask.weights)
        part = slice(found.n_now, None) if deferred else slice(0, found.n_now)
        return combine(outputs[part], work.order[part], ask.weights)

    def let_go(self, wave: int, layer: int) -> None:
        """Forget a layer's rows and results."""
        self._layers.pop((wave, layer), None)
        self.experts.let_go(wave, layer)

    def end(self, wave: int) -> None:
        """Nothing is kept by wave."""
