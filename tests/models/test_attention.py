"""Ways to attend that are chosen by the device: each is held against torch's own."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fiddler.errors import UnsupportedModelError
from fiddler.models.attention import _explicit, _tiled, attention_function
from fiddler.models.masks import Sight

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(0, 9))
"""Key heads, query heads for each, rows, and tokens before them."""


@given(shape=SHAPES, seed=st.integers(0, 999))
def test_query_heads_as_rows_are_those_of_grouped_queries(shape: tuple[int, int, int, int], seed: int) -> None:
    kv_heads, groups, n_rows, n_past = shape
    generator = torch.Generator().manual_seed(seed)
    n_tokens = n_rows + n_past
    q = torch.randn(1, kv_heads * groups, n_rows, 8, generator=generator)
    k, v = (torch.randn(1, kv_heads, n_tokens, 8, generator=generator) for _ in range(2))
    mask = torch.ones(n_rows, n_tokens, dtype=torch.bool).tril(n_past)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(_tiled(q, k, v, 0.3, mask), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(_explicit(q, k, v, 0.3, mask, None, None), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sinks_and_soft_caps_are_those_of_their_formulas(softcap: float | None) -> None:
    torch.manual_seed(0)
    q, k, v, sinks = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 6), torch.randn(4)
    seen = torch.ones(3, 5, dtype=torch.bool).tril(2)
    made = _explicit(q, k, v, 0.5, seen, softcap, sinks)
    for head in range(4):
        scores = q[0, head] @ k[0, head // 2].T * 0.5
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = torch.cat([scores.masked_fill(~seen, -torch.inf), sinks[head].expand(3, 1)], dim=1)
        torch.testing.assert_close(
            made[0, :, head], scores.softmax(1)[:, :5] @ v[0, head // 2], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"bias": torch.zeros(1)}, "takes bias,"),
        (
            {"position_ids": torch.zeros(1), "relative": torch.zeros(1), "slopes": torch.zeros(1)},
            "relative, slopes,",
        ),
        ({"is_causal": False, "bias": torch.zeros(1)}, "is_causal=False, bias,"),
    ],
)
def test_arguments_that_would_change_the_result_are_refused(arguments: dict[str, Any], named: str) -> None:
    rows = torch.zeros(1, 1, 1, 8)
    with pytest.raises(UnsupportedModelError, match=named):
        attention_function(None, rows, rows, rows, Sight(), dropout=0.0, **arguments)
