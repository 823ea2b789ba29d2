"""Keys and values of the past: each sequence owns its own, and a wave's cache appends to all of them.

transformers gives `update` the new rows of a whole packed step and expects keys and values back. A layer either
hands these to the attention function unchanged, which can then look up the past at its owner; or it transforms them
first (MLA expands latents), and then really needs all pasts one after the other. `Directness` learns from a layer's
first step which of the two it does.

`KvArena` is the memory of all sequences on a GPU: one allocation a layer, of which each sequence holds a run of
tokens, at the same place in all layers. The GPU's memory is divided when the engine opens, so nothing grows and
nothing is copied.
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from fiddler.errors import EngineError
from fiddler.models.masks import Sight


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Tokens `start` to `start + n_tokens` of an arena, in all its layers; one sequence's."""

    arena: "KvArena"
    start: int
    n_tokens: int

    @property
    def stop(self) -> int:
        """The first token behind it."""
        return self.start + self.n_tokens


class KvArena:
    """Keys and values of `n_tokens` tokens in every layer.

    A layer's memory is made when rows are first appended to it, for then its shape is known; layers may differ in
    heads, keys and values in their dimension.
    """

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.spare = n_tokens
        """Index of one more token that belongs to no run: for rows of a recorded step without a sequence."""
        self._free = [(0, n_tokens)] if n_tokens else []  # (start, stop), in order; no two of them adjoin
        self._held: set[Run] = set()
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def n_free(self) -> int:
        """Number of free tokens; they need not lie side by side."""
        return sum(stop - start for start, stop in self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers made so far."""
        return sum(part.nbytes for layer in self._layers.values() for part in layer)

    def reserve(self, n_tokens: int) -> Run | None:
        """Take the first free run of `n_tokens`, or `None` where none is so long.

        Raises `ValueError` unless it is for at least one token.
        """
        if n_tokens < 1:
            raise ValueError(f"a run of {n_tokens} tokens holds nothing")
        for i, (start, stop) in enumerate(self._free):
            if stop - start >= n_tokens:
                self._free[i : i + 1] = [(start + n_tokens, stop)] if stop - start > n_tokens else []
                run = Run(self, start, n_tokens)
                self._held.add(run)
                return run
        return None

    def release(self, run: Run) -> None:
        """Take back a run. Raises `ValueError` for one that is not held."""
        if run not in self._held:
            raise ValueError(f"tokens {run.start} to {run.stop} are not held")
        self._held.remove(run)
        insort(self._free, (run.start, run.stop))
        merged: list[tuple[int, int]] = []
        for start, stop in self._free:
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        self._free = merged

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, `[n_tokens + 1, heads, dim]`: the same memory for the arena's life.

        Raises `KeyError` for a layer nothing was appended to yet.
        """
        return self._layers[index]

    def buffers(self, index: int, run: Run, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return a run's keys and values in a layer, `[1, heads, run.n_tokens, dim]`: views of the layer's memory.

        A layer that is not there yet is made for the shapes of `keys` and `values`, `[1, heads, t, dim]`.
        """
        if index not in self._layers:
            self._layers[index] = self._made(keys), self._made(values)
        own_keys, own_values = (
            part[run.start : run.stop].transpose(0, 1).unsqueeze(0) for part in self._layers[index]
        )
        return own_keys, own_values

    def clear(self) -> None:
        """Give the memory of all layers back; runs stay as they are."""
        self._layers.clear()

    def check(self) -> None:
        """Raise `AssertionError` unless every token is held once or free, and free neighbours are one run."""
        held = sorted((run.start, run.stop) for run in self._held)
        parts = sorted(held + self._free)
        assert all(start < stop for start, stop in parts)
        ends = [0, *(stop for _, stop in parts)]
        assert [start for start, _ in parts] == ends[:-1], "tokens are held twice or lost"
        assert ends[-1] == self.n_tokens
        assert all(one[1] < other[0] for one, other in zip(self._free, self._free[1:], strict=False))

    def _made(self, rows: Tensor) -> Tensor:
        # Zeros: a kernel that reads a whole run and weighs what is not filled with 0 must not meet a NaN there.
        return rows.new_zeros(self.n_tokens + 1, rows.shape[1], rows.shape[3])


BLOCK_TOKENS = 256
"""KV buffers grow by at least this many tokens, and by half their size: appending is amortised O(1)."""


@dataclass(slots=True, eq=False)
class LayerKV:
    """One layer's keys and values of one sequence, `[1, heads, capacity, dim]` with `length` tokens filled."""

    keys: Tensor
    values: Tensor
    capacity: int
    length: int = 0


class SequenceKV:
    """The past of one sequence, layer by layer: in `run`, where it never moves, or in buffers of its own that grow.

    The run's owner releases it once no step is left that reads it.
    """

    def __init__(self, run: Run | None = None) -> None:
        self.run = run
        self.nbytes = 0
        """Bytes reserved over all layers."""
        self._layers: dict[int, LayerKV] = {}

    def append(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows `[1, heads, t, dim]` to a layer; returns its keys and values up to them, without copying."""
        layer = self._layers.get(index)
        start = layer.length if layer is not None else 0
        n_rows = keys.shape[-2]
        end = start + n_rows
        if layer is None or end > layer.capacity:
            layer = self._roomy(index, keys, values, end)
        layer.keys.narrow(-2, start, n_rows).copy_(keys)
        layer.values.narrow(-2, start, n_rows).copy_(values)
        layer.length = end
        return layer.keys.narrow(-2, 0, end), layer.values.narrow(-2, 0, end)

    def view(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, `[1, heads, length, dim]`, without copying.

        Raises `KeyError` for a layer nothing was appended to yet.
        """
        layer = self._layers[index]
        return layer.keys.narrow(-2, 0, layer.length), layer.values.narrow(-2, 0, layer.length)

    def length(self, index: int) -> int:
        """Return the tokens of a layer."""
        return self._layers[index].length if index in self._layers else 0

    def truncate(self, n_tokens: int) -> None:
        """Forget all but the first `n_tokens` tokens, as after a step that failed in some of the layers."""
        for layer in self._layers.values():
            layer.length = min(layer.length, n_tokens)

    def extend(self, n_tokens: int) -> None:
        """Take note that its run holds `n_tokens` tokens: a recorded step writes them without asking."""
        for layer in self._layers.values():
            layer.length = n_tokens

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over the layers that hold any."""
        return sum((each.keys.nbytes + each.values.nbytes) // each.capacity for each in self._layers.values())

    def _roomy(self, index: int, keys: Tensor, values: Tensor, n_tokens: int) -> LayerKV:
        """Make room for `n_tokens` tokens such as these in a layer."""
        old = self._layers.get(index)
        if self.run is None:
            wanted = max(n_tokens, old.length * 3 // 2 if old is not None else 0)
            capacity = -(-wanted // BLOCK_TOKENS) * BLOCK_TOKENS
            own_keys, own_values = (
                rows.new_empty(*rows.shape[:2], capacity, rows.shape[-1]) for rows in (keys, values)
            )
        elif n_tokens > self.run.n_tokens:  # a slice would end early, and one row be written to nowhere
            raise EngineError(
                f"a bug: token {n_tokens} of a sequence that has reserved keys and values for {self.run.n_tokens}"
            )
        else:
            own_keys, own_values = self.run.arena.buffers(index, self.run, keys, values)
            capacity = self.run.n_tokens
        layer = LayerKV(own_keys, own_values, capacity)
        self.nbytes += own_keys.nbytes + own_values.nbytes
        if old is not None:
            own_keys[:, :, : old.length] = old.keys[:, :, : old.length]
            own_values[:, :, : old.length] = old.values[:, :, : old.length]
            layer.length = old.length
            self.nbytes -= old.keys.nbytes + old.values.nbytes
        self._layers[index] = layer
        return layer


class Directness:
    """Whether each layer hands the result of `update` to the attention untouched; learnt once per model."""

    def __init__(self) -> None:
        self._direct: dict[int, bool] = {}

    def known_direct(self, layer: int) -> bool:
        """Whether the layer was seen to pass its keys and values on as they were."""
        return self._direct.get(layer, False)

    def observe(self, layer: int, direct: bool) -> None:
        """Note whether one layer did so in one step."""
        self._direct[layer] = self._direct.get(layer, True) and direct


class WaveCache(Cache):
    """The cache of one packed step: rows of all sequences side by side, each appended to its owner.

    `lengths` are the rows of each sequence in this step, `n_seen` the longest past before it.
    """

    def __init__(
        self, sequences: Sequence[SequenceKV], lengths: Sequence[int], directness: Directness, n_seen: int
    ) -> None:
        super().__init__(layers=[])
        self.sequences = sequences
        self.lengths = list(lengths)
        self.masks: dict[tuple[int, int, Sight], Tensor] = {}
        self.sights: dict[int, Sight] = {}
        """By layer, the tokens that its rows may see; noted by the attention."""
        self._directness = directness
        # By the layer that appended them, each sequence's keys and values; and, by id of the keys, what that layer
        # was given back, held so that ids stay theirs.
        self._pasts: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._returned: dict[int, tuple[int, Tensor, Tensor]] = {}
        self._n_seen = n_seen

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `[1, heads, ΣT, dim]`, and return keys and values for the layer's attention."""
        if len(self.sequences) == 1:
            pasts = [self.sequences[0].append(layer_idx, key_states, value_states)]
            keys, values = pasts[0]
        else:
            pasts, keys, values = [], key_states, value_states
            parts = key_states.split(self.lengths, -2), value_states.split(self.lengths, -2)
            for sequence, key, value in zip(self.sequences, *parts, strict=True):
                pasts.append(sequence.append(layer_idx, key, value))
            if not self._directness.known_direct(layer_idx):
                all_keys, all_values = zip(*pasts, strict=True)
                keys, values = torch.cat(all_keys, dim=-2), torch.cat(all_values, dim=-2)
        self._pasts[layer_idx] = pasts
        self._returned[id(keys)] = (layer_idx, keys, values)
        return keys, values

    def pasts(self, keys: Tensor, values: Tensor, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Return each sequence's keys and values `[1, heads, L, dim]`, given the attention's own arguments.

        `layer` is the attention's own; a layer that shares another's keys is given that layer's, without what the
        wave behind, with later rows of the same sequence, has appended to them since.
        """
        source, returned_keys, returned_values = self._returned.get(id(keys), (layer, None, None))
        direct = returned_keys is keys and returned_values is values
        pasts = self._pasts[source]
        if len(pasts) > 1:
            self._directness.observe(source, direct)
        if direct:
            return pasts
        totals = []
        for past, _ in pasts:
            totals.append(past.shape[-2])
        return list(zip(keys.split(totals, -2), values.split(totals, -2), strict=True))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the longest past at the start of the step."""
        return self._n_seen
