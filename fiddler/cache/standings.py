"""The first of many experts in an order that moves, found without looking at them all."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from typing import Generic, TypeVar

from fiddler.cache.keys import Key

Place = tuple[float, int, int, int]
"""Worth, recency, and the id to tell ties apart: the smallest comes first, no two are equal."""

T = TypeVar("T", bound=Hashable)


class Ranking(Generic[T]):
    """A lazy heap. `place` says where an item stands now, or None if it is out of the running.

    An item that moves *away* from the front, or drops out, need not be reported: that shows when it gets there.
    One that comes in, or moves towards the front, must be reported by `touch`.
    """

    def __init__(self, place: Callable[[T], Place | None]) -> None:
        self._place = place
        self._heap: list[tuple[Place, T]] = []
        self._places: dict[T, Place] = {}
        self._touched: set[T] = set()

    def touch(self, items: Iterable[T]) -> None:
        """These may have come in or moved towards the front."""
        self._touched.update(items)

    def first(self) -> T | None:
        """The item at the front, which stays there; None where nobody is in the running."""
        if self._touched:
            self._settle()
        heap, places = self._heap, self._places
        while heap:
            known, item = heap[0]
            if places.get(item) != known:
                heappop(heap)
                continue
            now = self._place(item)
            if now == known:
                return item
            if now is None:
                heappop(heap)
                del places[item]
            else:
                places[item] = now
                heapreplace(heap, (now, item))
        return None

    @property
    def front(self) -> T:
        """What `first` found just now; IndexError if it found nothing."""
        return self._heap[0][1]

    def search(self, items: Iterable[T]) -> T | None:
        """The first of these, found by looking at all: what `first` must agree with."""
        placed = [(place, item) for item in items if (place := self._place(item)) is not None]
        return min(placed)[1] if placed else None

    def _settle(self) -> None:
        for item in self._touched:
            now = self._place(item)
            if now is not None and self._places.get(item) != now:
                self._places[item] = now
                heappush(self._heap, (now, item))
        self._touched.clear()
        if len(self._heap) > 2 * len(self._places) + 64:  # outdated entries deep down would pile up for ever
            self._heap = [(place, item) for item, place in self._places.items()]
            heapify(self._heap)


class Standings:
    """A ranking in every layer, and one of the layers by their first.

    Two levels, because ageing moves all experts of a layer at once and leaves their order alone: `within` places an
    expert in its layer (or not at all), `across` places a layer's first among those of the others, and only layers
    that are `open` to others have a place there.
    """

    def __init__(
        self,
        n_layers: int,
        within: Callable[[Key], Place | None],
        across: Callable[[Key], Place],
        is_open: Callable[[int], bool] = lambda layer: True,
    ) -> None:
        self._across = across
        self._is_open = is_open
        self._layers = [Ranking(within) for _ in range(n_layers)]
        self._top = Ranking(self._layer_place)

    def touch(self, layer: int, keys: Iterable[Key] = ()) -> None:
        """These experts, or the layer as a whole, may have moved towards the front; see `Ranking`."""
        self._layers[layer].touch(keys)
        self._top.touch((layer,))

    def first_of(self, layer: int) -> Key | None:
        """The first of one layer, open or not."""
        return self._layers[layer].first()

    def first(self) -> Key | None:
        """The first of all open layers."""
        layer = self._top.first()
        return None if layer is None else self._layers[layer].front

    def _layer_place(self, layer: int) -> Place | None:
        first = self._layers[layer].first() if self._is_open(layer) else None
        return None if first is None else self._across(first)

    def check(self, keys: Sequence[Sequence[Key]]) -> None:
        """AssertionError where a search through all `keys`, by layer, finds another first."""
        firsts: dict[Key, Place] = {}
        for layer, ranking in enumerate(self._layers):
            first = ranking.search(keys[layer])
            assert ranking.first() == first, f"layer {layer} has another first"
            if first is not None and self._is_open(layer):
                firsts[first] = self._across(first)
        assert self.first() == min(firsts, key=firsts.__getitem__, default=None), "another layer has the first"
