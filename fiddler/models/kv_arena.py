"""Memory for the keys and values of all sequences: one allocation a layer, and each sequence a run of tokens in it.

A GPU's memory is divided when the engine opens, so nothing here grows and nothing is copied. All layers have room
for the same tokens: a sequence's run says where it lies in each of them.
"""

from bisect import insort
from dataclasses import dataclass

from torch import Tensor


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
