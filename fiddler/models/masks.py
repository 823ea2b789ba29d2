"""The mask seam: in place of a mask tensor, attention gets a short description (`Sight`) of the tokens that a row
sees.

transformers composes a mask of functions that say for two positions whether one sees the other, and hands it to the
function registered for the attention implementation, to make a tensor of it. Ours reads the parts instead: the
positions of a packed step's rows are those of many sequences, of which transformers knows nothing. A mask without
such a description is refused by the layers that attend by it: the model then shares no steps (packing.py).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from fiddler.errors import UnsupportedModelError

MaskFunction = Callable[..., Any]
"""`(batch, head, row's position, other position)` to whether the row sees the other."""


class Sight(NamedTuple):
    """The tokens of its own sequence that a row sees: itself and earlier ones, within these limits; none later."""

    window: int = 0
    """The newest tokens, itself among them; 0: all."""
    chunk: int = 0
    """The tokens of its own chunk, where the sequence is cut into chunks of this many; 0: all."""
    unknown: str = ""
    """The part of a mask that these limits cannot describe; empty if there is none."""

    def hidden(self, n_tokens: int) -> int:
        """Return how many tokens of a sequence of `n_tokens` its newest does not see, the first ones."""
        first = max(n_tokens - self.window, 0) if self.window else 0
        return max(first, (n_tokens - 1) // self.chunk * self.chunk) if self.chunk else first

    def sees(self, rows: Tensor, others: Tensor) -> Tensor:
        """Return whether rows see others, by positions in one sequence; shapes are broadcast."""
        seen = others <= rows
        if self.window:
            seen &= others > rows - self.window
        if self.chunk:
            seen &= others // self.chunk == rows // self.chunk
        return seen


def mask(*, mask_function: MaskFunction, attention_mask: Tensor | None = None, **sizes: Any) -> Sight:
    """Return the description of a mask; transformers calls this in place of its own mask implementations."""
    if attention_mask is not None:
        return Sight(unknown="a mask of padding")
    return read(mask_function)


def read(function: MaskFunction) -> Sight:
    """Return the description of a mask function of transformers."""
    if function is masking_utils.causal_mask_function:
        return Sight()
    causal, windows, chunks, others = False, set[int](), set[int](), list[str]()
    for part in _parts(function):
        code = getattr(part, "__code__", None)
        if part is masking_utils.causal_mask_function:
            causal = True
        elif code is _WINDOW:
            windows.add(_held(part)["sliding_window"])
        elif code is _CHUNK:  # its other number is the padding, and of that there is none
            chunks.add(_held(part)["chunk_size"])
        else:
            others.append(getattr(part, "__qualname__", repr(part)).partition(".")[0])
    if not causal:
        unknown = f"a mask that shows later tokens ({', '.join(others)}; is_causal, use_bidirectional_attention)"
    elif others:
        unknown = f"a mask of {', '.join(others)}"
    elif any(type(size) is not int or size < 1 for size in windows | chunks) or len(chunks) > 1:
        limits = [f"sliding_window={size}" for size in windows]
        unknown = " and ".join(limits + [f"attention_chunk_size={size}" for size in chunks])
    else:
        return Sight(min(windows, default=0), min(chunks, default=0))
    return Sight(unknown=unknown)


def sight(attention_mask: Any) -> Sight:
    """Return the description that a layer was given. Raises `UnsupportedModelError` for one we cannot attend by."""
    told = attention_mask if isinstance(attention_mask, Sight) else Sight(unknown="a mask that it makes itself")
    if told.unknown:
        raise UnsupportedModelError(f"the model attends by {told.unknown}, which packed steps do not know")
    return told


def _parts(function: MaskFunction) -> Iterator[MaskFunction]:
    """Yield the functions that must all agree."""
    if getattr(function, "__code__", None) is _AND:
        for part in _held(function)["mask_functions"]:
            yield from _parts(part)
    else:
        yield function


def _held(function: Any) -> dict[str, Any]:
    """Return the variables that a function of transformers closes over."""
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _code(function: Any) -> Any:
    return function.__code__


# A function made anew for each mask is known by its code.
_AND = _code(masking_utils.and_masks())
_WINDOW = _code(masking_utils.sliding_window_overlay(1))
_CHUNK = _code(masking_utils.chunked_overlay(1, torch.zeros(1)))
