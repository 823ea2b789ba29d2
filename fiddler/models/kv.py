"""Keys and values of the past: each sequence owns its own, a wave's cache appends to all of them.

transformers gives `update` the new rows of a whole packed step and expects keys and values back. What comes back
is either handed to the attention function as it is, and then that function can look the past up at its owner, or it
is transformed first (MLA expands latents), and then the ragged concatenation of all pasts is really needed. Which
of the two a layer does is learnt from its first step: `Directness`.

Memory for the keys and values of all sequences: one allocation a layer, and each sequence a run of tokens in it.

A GPU's memory is divided when the engine opens, so nothing here grows and nothing is copied. All layers have room
for the same tokens: a sequence's run says where it lies in each of them.
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
        """One more token, of no run: for rows of a recorded step that stand for no sequence."""
        self._free = [(0, n_tokens)] if n_tokens else []  # (start, stop), in order; no two of them adjoin
        self._held: set[Run] = set()
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def n_free(self) -> int:
        """Tokens nobody holds; they need not lie side by side."""
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

        `keys` and `values`, `[1, heads, t, dim]`, say what to make the layer of if it is not there yet.
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


class LayerKV:
    """One layer's keys and values of one sequence, `[1, heads, capacity, dim]` with `length` tokens filled.

    Its buffers grow.
    """

    __slots__ = ("_keys", "_values", "length")

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows `[1, heads, t, dim]`."""
        end = self.length + keys.shape[-2]
        own_keys, own_values = self._keys, self._values = self._roomy(keys, values, end)
        own_keys[:, :, self.length : end] = keys
        own_values[:, :, self.length : end] = values
        self.length = end

    def view(self, n_tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the first tokens, `[1, heads, n_tokens, dim]`, without copying."""
        assert self._keys is not None
        assert self._values is not None
        return self._keys[:, :, :n_tokens], self._values[:, :, :n_tokens]

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return sum(t.nbytes for t in (self._keys, self._values) if t is not None)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return sum(t.nbytes // t.shape[-2] for t in (self._keys, self._values) if t is not None)

    def _roomy(self, keys: Tensor, values: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
        """Return buffers with room for `n_tokens` tokens such as these."""
        return self._grown(self._keys, keys, n_tokens), self._grown(self._values, values, n_tokens)

    def _grown(self, buffer: Tensor | None, rows: Tensor, n_tokens: int) -> Tensor:
        if buffer is not None and buffer.shape[-2] >= n_tokens:
            return buffer
        wanted = max(n_tokens, self.length * 3 // 2)
        capacity = -(-wanted // BLOCK_TOKENS) * BLOCK_TOKENS
        grown = rows.new_empty(*rows.shape[:2], capacity, rows.shape[-1])
        if buffer is not None:
            grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown


class RunKV(LayerKV):
    """One layer's keys and values of one sequence in its run of an arena; they never grow nor move."""

    __slots__ = ("_index", "_run")

    def __init__(self, index: int, run: Run) -> None:
        super().__init__()
        self._index = index
        self._run = run

    def _roomy(self, keys: Tensor, values: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
        if n_tokens > self._run.n_tokens:  # a slice would end early, and one row be written to nowhere
            raise EngineError(
                f"a bug: token {n_tokens} of a sequence that has reserved keys and values for {self._run.n_tokens}"
            )
        if self._keys is None or self._values is None:
            return self._run.arena.buffers(self._index, self._run, keys, values)
        return self._keys, self._values


class SequenceKV:
    """The past of one sequence, layer by layer: in `run`, or in buffers of its own that grow.

    Whoever reserved the run releases it, once no step is left that reads it.
    """

    def __init__(self, run: Run | None = None) -> None:
        self.run = run
        self._layers: dict[int, LayerKV] = {}

    def layer(self, index: int) -> LayerKV:
        """Return a layer's keys and values, empty at first."""
        found = self._layers.get(index)
        if found is None:
            found = self._layers[index] = LayerKV() if self.run is None else RunKV(index, self.run)
        return found

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
        return sum(layer.token_bytes for layer in self._layers.values())

    @property
    def nbytes(self) -> int:
        """Bytes reserved over all layers."""
        return sum(layer.nbytes for layer in self._layers.values())


class Directness:
    """Which layers hand what `update` returned to the attention function untouched; learnt once per model."""

    def __init__(self) -> None:
        self._direct: dict[int, bool] = {}

    def known_direct(self, layer: int) -> bool:
        """Whether the layer was seen to pass its keys and values on as they were."""
        return self._direct.get(layer, False)

    def observe(self, layer: int, direct: bool) -> None:
        """Note what one layer did in one step."""
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
        """By layer, what its rows may see; noted by the attention."""
        self._directness = directness
        self._totals: dict[int, list[int]] = {}  # by layer, tokens of each sequence once this step's are in
        self._returned: dict[
            int, tuple[int, Tensor, Tensor]
        ] = {}  # by id of the keys, held so that ids stay theirs
        self._n_seen = n_seen

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `[1, heads, ΣT, dim]` and return what the layer's attention needs."""
        owners = [sequence.layer(layer_idx) for sequence in self.sequences]
        keys, values = key_states, value_states
        if len(owners) == 1:
            owners[0].append(key_states, value_states)
            keys, values = owners[0].view(owners[0].length)
        else:
            rows = zip(
                owners, key_states.split(self.lengths, -2), value_states.split(self.lengths, -2), strict=True
            )
            for owner, key, value in rows:
                owner.append(key, value)
            if not self._directness.known_direct(layer_idx):
                pasts = [owner.view(owner.length) for owner in owners]
                keys = torch.cat([past[0] for past in pasts], dim=-2)
                values = torch.cat([past[1] for past in pasts], dim=-2)
        self._totals[layer_idx] = [owner.length for owner in owners]
        self._returned[id(keys)] = (layer_idx, keys, values)
        return keys, values

    def pasts(self, keys: Tensor, values: Tensor, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Return each sequence's `[1, heads, L, dim]` keys and values for what the attention was given.

        `layer` is the attention's own; a layer that shares another's keys is given that layer's, without what the
        wave behind, with later rows of the same sequence, has appended to them since.
        """
        source, returned_keys, returned_values = self._returned.get(id(keys), (layer, None, None))
        direct = returned_keys is keys and returned_values is values
        if len(self.sequences) > 1:
            self._directness.observe(source, direct)
        totals = self._totals[source]
        if direct:
            return [s.layer(source).view(n) for s, n in zip(self.sequences, totals, strict=True)]
        return list(zip(keys.split(totals, -2), values.split(totals, -2), strict=True))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the longest past at the start of the step."""
        return self._n_seen
