"""Attention and keys and values as a GPU graph records them: nothing in the decoding step is decided by the host.

One row a sequence; where each sequence's past lies and how long it is are numbers in the GPU's memory. Attention
looks at the same number of tokens for all sequences, a bucket, and masks the tokens that are not theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from fiddler.errors import UnsupportedModelError
from fiddler.models.kv import KvArena
from fiddler.models.masks import Sight


class Row(NamedTuple):
    """A sequence's row in a decoding step."""

    start: int
    """First token of the sequence's run."""
    id: int
    position: int
    """Tokens before it."""


@dataclass(frozen=True, slots=True)
class StaticInputs:
    """The numbers of a step of `n` rows, int64 `[4, n]` on the model's device, written anew for each."""

    numbers: Tensor

    @property
    def ids(self) -> Tensor:
        """The rows' tokens, `[1, n]`."""
        return self.numbers[0:1]

    @property
    def positions(self) -> Tensor:
        """Tokens before each, `[1, n]`."""
        return self.numbers[1:2]

    @property
    def starts(self) -> Tensor:
        """Where each sequence's run begins, `[n]`."""
        return self.numbers[2]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence once this step's is in, `[n]`."""
        return self.numbers[3]


def step_numbers(arena: KvArena, rows: Sequence[Row], n: int) -> Tensor:
    """Return the numbers of `StaticInputs` for these rows; further ones, up to `n`, go to the spare token."""
    nobody = Row(arena.spare, 0, 0)
    padded = [*rows, *[nobody] * (n - len(rows))]
    return torch.tensor([[r.id, r.position, r.start, r.position + 1] for r in padded]).t().contiguous()


class CapturedCache(Cache):
    """Keys and values of one row a sequence, in the arena: `update` writes rows where the inputs say.

    `update` returns its input, since the attention looks the past up itself; or, if `whole`, the past of all
    sequences, each as long as the bucket, for models that transform it first (MLA expands latents). The cheap form,
    returning the input, is tried first; a model that needs the other raises `UnsupportedModelError`.
    """

    def __init__(self, arena: KvArena, inputs: StaticInputs, n_tokens: int, *, whole: bool = False) -> None:
        """`n_tokens` is the bucket: no sequence is longer."""
        super().__init__(layers=[])
        self._arena = arena
        self._inputs = inputs
        self._n_tokens = n_tokens
        self._whole = whole
        # By id of the keys, which are held so that ids stay theirs.
        self._returned: dict[int, tuple[int, Tensor, Tensor]] = {}
        self._at: Tensor | None = None
        self._past: Tensor | None = None
        self._seen: dict[Sight, Tensor] = {}
        self._biases: dict[Sight, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write `[1, heads, n, dim]`; returns them, or `whole` pasts `[1, heads, n · bucket, dim]`."""
        keys, values = self._arena.layer(layer_idx)
        if self._at is None:
            self._at = self._inputs.starts + self._inputs.lengths - 1
        keys.index_copy_(0, self._at, key_states[0].transpose(0, 1))
        values.index_copy_(0, self._at, value_states[0].transpose(0, 1))
        if self._whole:
            key_states, value_states = (part.flatten(0, 1).transpose(0, 1)[None] for part in self._pasts(layer_idx))
        else:
            self._returned[id(key_states)] = layer_idx, key_states, value_states
        return key_states, value_states

    def past(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pasts `[n, heads, bucket, dim]` that belong to the tensors that the attention was given."""
        if self._whole:
            sizes = self._inputs.starts.shape[0], self._n_tokens
            own_keys, own_values = (part[0].unflatten(1, sizes).transpose(0, 1) for part in (keys, values))
            return own_keys, own_values
        layer, returned_keys, returned_values = self._returned.get(id(keys), (-1, None, None))
        if returned_keys is not keys or returned_values is not values:
            raise UnsupportedModelError("a layer changes keys or values between cache and attention")
        own_keys, own_values = (part.transpose(1, 2) for part in self._pasts(layer))
        return own_keys, own_values

    def _pasts(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, `[n, bucket, heads, dim]`."""
        if self._past is None:
            ahead = torch.arange(self._n_tokens, device=self._inputs.numbers.device)
            # Beyond a sequence's end its last token again: a NaN among a neighbour's would come through the mask.
            last = self._inputs.lengths[:, None] - 1
            self._past = self._inputs.starts[:, None] + torch.minimum(ahead, last)  # [n, bucket]
        keys, values = self._arena.layer(layer)
        return keys[self._past], values[self._past]

    def visible(self, sight: Sight) -> Tensor:
        """Return which tokens each row sees, `[n, 1, 1, bucket]` bool; made once a step, for layers of one kind."""
        seen = self._seen.get(sight)
        if seen is None:
            newest = self._inputs.lengths[:, None] - 1
            past = torch.arange(self._n_tokens, device=newest.device)
            seen = self._seen[sight] = sight.sees(newest, past)[:, None, None]
        return seen

    def bias(self, sight: Sight, dtype: torch.dtype) -> Tensor:
        """Return the mask as a bias on scores, zero or minus infinity; made once a step."""
        bias = self._biases.get(sight)
        if bias is None:
            seen = self.visible(sight)
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)
            self._biases[sight] = bias
        return bias

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return a past that is not empty: positions are given, and nothing else hangs on it."""
        return self._n_tokens - 1
