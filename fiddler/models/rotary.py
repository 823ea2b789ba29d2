"""Rotary embeddings that depend on the length of a sequence, and which sequences may share a forward.

Dynamic NTK, longrope and Phi-MoE's scales look for the last position of a forward and rotate all its rows by it;
some keep what they found for the next forward. They do not know which rows are of other sequences, nor a prompt's
later chunks. So a forward says how long its sequences are (`Forward.length`), and sequences of different *regimes*,
which are rotated differently, travel apart. No kind of embedding is known here: a regime is found by calling the
embedding.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from fiddler.errors import UnsupportedModelError

_N_REGIMES = 1024
"""Lengths whose regime is remembered."""
_OPEN = frozenset({"dynamic", "longrope"})
"""Rope types that depend on a length in every model."""


class Rotary:
    """The embeddings of a model that depend on a length; from now on they go by `Forward.length`.

    Without one they go by the positions they are given, as transformers does. They keep nothing of a forward.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        for module in modules:
            module.forward = _told(module)
        self.regime = lru_cache(_N_REGIMES)(self._regime)
        """Tokens of a sequence to its regime; sequences of one regime may share a forward."""

    def _regime(self, n_tokens: int) -> bytes:
        return b"".join(_rotation(module, n_tokens) for module in self._modules)


def find_rotary(model: nn.Module, longest: int) -> Rotary | None:
    """Return the embeddings that depend on lengths of up to `longest` tokens, or `None` if a model has none.

    Raises `UnsupportedModelError` for one that does and does not say how.
    """
    found = [module for module in model.modules() if _is_rotary(module) and _depends(module, longest)]
    return Rotary(found) if found else None


def starts_over(model: Any, n_past: int) -> bool:
    """Whether `generate` forgets a past of `n_past` tokens before the next, and runs all of them again.

    transformers' own hook is asked: Phi-MoE overrides it, to start over where its scale for long texts begins.
    """
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device).expand(1, n_past + 1)
    inputs = model.prepare_inputs_for_generation(
        ids, past_key_values=_Past(n_past), next_sequence_length=1, use_cache=True
    )
    return inputs.get("past_key_values") is None


class _Past:
    """A past that only knows its length."""

    def __init__(self, n_tokens: int) -> None:
        self._n_tokens = n_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._n_tokens


def _is_rotary(module: nn.Module) -> bool:
    """Whether a module is transformers' rotary embedding of text; those of images have axes for positions."""
    kinds = _kinds(module)
    return bool(kinds) and "axial" not in kinds.values() and "position_ids" in signature(module.forward).parameters


def _depends(module: nn.Module, longest: int) -> bool:
    try:
        return _rotation(module, 1) != _rotation(module, longest)
    except Exception as error:
        if not _OPEN.isdisjoint(_kinds(module).values()):
            raise UnsupportedModelError(
                f"{type(module).__name__} depends on the length of a sequence and does not say how: "
                f"{type(error).__name__}: {error}; check rope_parameters in config.json"
            ) from error
        return False  # one of a tower, with positions of another kind, which no text's tokens pass


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """Return the rope types of a module by layer type, which is `None` where there is one for all."""
    kinds = getattr(module, "rope_type", {})
    return {None: kinds} if isinstance(kinds, str) else kinds


def _rotation(module: nn.Module, n_tokens: int) -> bytes:
    """Return how the second token of a sequence of `n_tokens` is rotated, for each layer type."""
    device = next(module.buffers()).device
    positions = torch.tensor([[1, max(n_tokens - 1, 1)]], device=device)
    if hasattr(module, "mrope_section"):  # three axes, alike for text
        positions = positions.expand(3, 1, 2)
    like, rotations = torch.zeros(1, dtype=torch.float32, device=device), list[Tensor]()
    for layer_type in _kinds(module):
        extra = {} if layer_type is None else {"layer_type": layer_type}
        rotations += _parts(_run(module, like, positions, **extra))
    return b"".join(part[..., :1, :].cpu().numpy().tobytes() for part in rotations)


def _told(module: nn.Module) -> Any:
    """Return a forward of `module` that uses the length of the current `Forward`."""

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        length = getattr(getcurrent(), "length", None)
        if length is None:
            return _run(module, x, position_ids, *args, **kwargs)
        # One more row, at the last position, for the embedding to see; it is cut off again.
        last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)
        made = _run(module, x, torch.cat([position_ids, last], dim=-1), *args, **kwargs)
        parts = tuple(part[..., :-1, :] for part in _parts(made))
        return parts if isinstance(made, tuple) else parts[0]

    return forward


def _run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a copy of `module`, since it may keep values of a call in attributes or buffers."""
    fresh = copy(module)
    fresh._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
    return type(module).forward(fresh, *args, **kwargs)


def _parts(made: Any) -> Iterator[Tensor]:
    yield from made if isinstance(made, tuple) else (made,)
