"""The attention seam: rows of all sequences arrive packed, each sequence's rows attend to their own past.

Only a layer's mask says what its rows see (masks.py): transformers' eager attention ignores a window among the
arguments too. Soft cap and sinks are arguments.

In a decoding step that a GPU graph records, nothing is decided by the host. One row a sequence; where each
sequence's past lies and how long it is are numbers in the GPU's memory. Attention looks at the same number of
tokens for all sequences, a bucket, and masks the tokens that are not theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from fiddler.errors import UnsupportedModelError
from fiddler.models import masks
from fiddler.models.kv import KvArena, WaveCache
from fiddler.models.masks import Sight

NAME = "fiddler"
"""The attention implementation's name in transformers' registry."""

_IGNORED = frozenset({"position_ids", "cache_position", "input_ids", "attention_mask", "position_embeddings"})
"""Tensors that models pass along to any attention function and that ours has no use for."""


def attention_function(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sight,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend; `query` is `[1, heads, ΣT, dim]`, the result `[1, ΣT, heads, dim]`.

    Raises `UnsupportedModelError` for a mask or an argument that would change the result and is not known here.
    """
    sight = attention_mask
    if not isinstance(sight, Sight) or sight.unknown:
        sight = masks.sight(attention_mask)  # which raises
    unknown = ["is_causal=False"] if kwargs.get("is_causal") is False else []
    for name, argument in kwargs.items():
        if isinstance(argument, Tensor) and name not in _IGNORED:
            unknown.append(name)
    if unknown:
        raise UnsupportedModelError(
            f"the model's attention takes {', '.join(unknown)}, which packed steps do not know"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    plain = softcap is None and s_aux is None
    wave: WaveCache | CapturedCache = getcurrent().wave
    if isinstance(wave, CapturedCache):
        return _recorded(query, *wave.past(key, value), scale, sight, wave, softcap, s_aux), None
    wave.sights[module.layer_idx] = sight
    pasts = wave.pasts(key, value, module.layer_idx)
    # One sequence's rows are all there are; anything else is split, which also checks how many.
    queries = (query,) if query.shape[2] == wave.lengths[0] else query.split(wave.lengths, -2)
    outputs = []
    for q, (k, v) in zip(queries, pasts, strict=True):
        first, n_rows, n_tokens = 0, q.shape[2], k.shape[2]
        if sight.window or sight.chunk:
            first = sight.hidden(n_tokens - n_rows + 1)  # what the oldest row does not see, none does
            k, v = k[:, :, first:], v[:, :, first:]
        if plain and n_rows == 1:
            outputs.append(_grouped(q, k, v, scale))
            continue
        mask = _mask(n_rows, n_tokens, first, sight, wave, q.device)
        if plain:
            outputs.append(_fused(q, k, v, scale, mask))
        else:
            outputs.append(_explicit(q, k, v, scale, mask, softcap, s_aux))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, masks.mask)


def _recorded(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sight: Sight,
    wave: "CapturedCache",
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return `[1, n, heads, dim]` for one row of each of `n` sequences, whose lengths the host does not know."""
    rows = query.permute(2, 1, 0, 3)
    if softcap is None and sinks is None:
        out = _grouped(rows, k, v, scale, wave.bias(sight, query.dtype))
    else:
        out = _explicit(rows, k, v, scale, wave.visible(sight), softcap, sinks)
    return out.transpose(0, 1)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Return `[1, t, heads, dim]` through torch's fused attention; no `mask` is plain causal from the start."""
    grouped = q.shape[1] != k.shape[1]
    if mask is not None and grouped and q.is_cuda:
        return _tiled(q, k, v, scale, mask)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _tiled(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Return `[1, t, heads, dim]`, the query heads of a key head as its rows, each with the `mask` `[t, L]`.

    On a GPU no fused attention of torch's takes both a mask and fewer key heads, and the one that does writes all
    scores out in float32 (`scaled_dot_product_attention`, `enable_gqa`; pytorch pull request 191085).
    """
    groups = q.shape[1] // k.shape[1]
    rows = q.unflatten(1, (-1, groups)).flatten(2, 3)  # [1, kv heads, groups · t, dim]
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask.repeat(groups, 1), scale=scale)
    heads: Tensor = out.unflatten(2, (groups, -1)).flatten(1, 2)
    return heads.transpose(1, 2)


def _grouped(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Return `[n, 1, heads, dim]` for one row of each of `n` sequences.

    The query heads that share a key head become its rows: no causal mask, and no repeated keys.
    """
    n, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    rows = q.reshape(n, kv_heads, heads // kv_heads, q.shape[-1])
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=bias, scale=scale)
    return out.reshape(n, 1, heads, v.shape[-1])


def _mask(
    n_rows: int, n_tokens: int, first: int, sight: Sight, wave: WaveCache, device: torch.device
) -> Tensor | None:
    """Return which tokens from `first` on each new row sees, `[t, L - first]` bool.

    `None` where each row sees all tokens up to itself: for one row, or plain causal from the start. Made once a
    step: layers of one kind share it.
    """
    if n_rows == 1 or (n_rows == n_tokens and not sight.hidden(n_tokens)):
        return None
    mask = wave.masks.get((n_rows, n_tokens, sight))
    if mask is None:
        position = torch.arange(n_tokens - n_rows, n_tokens, device=device)[:, None]  # [t, 1]
        past = torch.arange(first, n_tokens, device=device)[None, :]  # [1, L - first]
        mask = wave.masks[n_rows, n_tokens, sight] = sight.sees(position, past)
    return mask


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return `[n, t, heads, dim]` step by step, for soft-capped scores and attention sinks.

    A sink is one more score per head that takes probability and gives nothing (gpt-oss; arXiv:2309.17453). On a CPU
    products are in float32: in 16 bits oneDNN would keep a kernel for every length of a past (devices/kernels.py).
    """
    wide = q.dtype if q.is_cuda else torch.float32
    groups, n_rows = q.shape[1] // k.shape[1], q.shape[2]
    rows = q.unflatten(1, (-1, groups)).flatten(2, 3)  # a key head's query heads: keys need no copies
    scores = torch.matmul(rows.to(wide), k.transpose(2, 3).to(wide)).to(q.dtype) * scale
    scores = scores.unflatten(2, (groups, n_rows)).flatten(1, 2)  # [n, heads, t, L]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and n_rows > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]]
    out = torch.matmul(weights.unflatten(1, (-1, groups)).flatten(2, 3).to(wide), v.to(wide)).to(q.dtype)
    heads: Tensor = out.unflatten(2, (groups, n_rows)).flatten(1, 2)
    return heads.transpose(1, 2)


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
