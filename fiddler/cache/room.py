"""Who may take a slot from whom: a quota per layer, or one pool in which every layer keeps a floor."""

from fiddler.cache.keys import Key


class Room:
    """The experts that hold a slot, by layer, and how many each layer may or must keep.

    `per_layer` divides the slots equally, the remainder going to the first layers. Otherwise a layer with no more
    than `floor` slots gives none to another; a floor that all layers together could not have is lowered.
    """

    def __init__(self, n_slots: int, n_layers: int, *, per_layer: bool, floor: int = 0) -> None:
        share, rest = divmod(n_slots, n_layers)
        self.floor = 0 if per_layer else min(floor, share)
        self._n_slots = n_slots
        self._n_held = 0
        self._quotas = [share + (layer < rest) if per_layer else n_slots for layer in range(n_layers)]
        self._held: list[set[Key]] = [set() for _ in range(n_layers)]

    def __contains__(self, key: Key) -> bool:
        return key in self._held[key[0]]

    def layer(self, layer: int) -> set[Key]:
        """The layer's experts that hold a slot."""
        return self._held[layer]

    def quota(self, layer: int) -> int:
        """The most slots the layer may have."""
        return self._quotas[layer]

    def vacant(self, layer: int) -> bool:
        """Whether the layer may have one of the free slots."""
        return self._n_held < self._n_slots and len(self._held[layer]) < self._quotas[layer]

    def spares(self, layer: int) -> bool:
        """Whether the layer may lose a slot to another."""
        return len(self._held[layer]) > self.floor

    def enter(self, key: Key) -> None:
        """The expert holds a slot from now on."""
        self._held[key[0]].add(key)
        self._n_held += 1

    def leave(self, key: Key) -> None:
        """The expert holds none any more."""
        self._held[key[0]].remove(key)
        self._n_held -= 1

    def check(self, held: set[Key]) -> None:
        """AssertionError where this is not what the slots say, or a layer is over its quota."""
        assert set().union(*self._held) == held
        assert self._n_held == len(held) <= self._n_slots
        for layer, keys in enumerate(self._held):
            assert all(key[0] == layer for key in keys)
            assert len(keys) <= self._quotas[layer], "a layer is over its quota"
