"""Look-ahead: which experts the next layer's router would pick for the rows of this layer.

No architecture is known here. On first use the next MoE block is called on the rows as a `Forward` of its own and
unwound at its experts call, which holds the picked experts; no expert runs. If one of the block's own modules made
that choice from the rows alone, it is the router; from then on it is called without the block, which may run shared
experts first. A block that keeps anything of such a call is not asked again.
"""

import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fiddler.models.seam import ExpertsCall, ExpertsModule, Forward, is_seamed

_Ask = Callable[[Tensor], Tensor]
"""`hidden [T, H] -> index [T, K]`."""

_N_TRIED = 16
"""Rows of the first call, which runs all code of a block up to its experts, and checks it."""


class Lookahead:
    """The MoE blocks of a model, each to be asked for its experts one layer early.

    `experts` are the model's experts modules by path in layer order, bound to the seam. To be used on the thread
    that drives the model's forwards, while these are suspended.
    """

    def __init__(self, model: nn.Module, experts: Mapping[str, ExpertsModule]) -> None:
        self._blocks = [*(_block(model, *paths) for paths in pairwise(experts)), None]
        self._asks: list[_Ask | None] = [None] * len(self._blocks)

    def expects(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return the experts `[T, K]` that the next layer's router picks for `hidden` `[T, H]`, this layer's rows.

        A row's experts of most weight come first, where the router itself gives the weights.
        `None` after the last layer, and where the model does not allow it. Raises nothing.
        """
        block = self._blocks[layer]
        if block is None:
            return None
        try:
            ask = self._asks[layer]
            if ask is None:
                ask = self._asks[layer] = _learn(block, hidden[:_N_TRIED], layer + 1)
            return ask(hidden)
        except Exception:  # whatever a block does not bear must not end the real forward
            self._blocks[layer] = None
            return None


def _block(model: nn.Module, before: str, path: str) -> nn.Module | None:
    """Return the block of the experts at `path`, if the model runs it after the one at `before`.

    Experts of a vision tower, or of vision tokens, have other paths than those of the text layer before them.
    """
    parent = path.rpartition(".")[0]
    if not parent or re.sub(r"\d+", "*", before) != re.sub(r"\d+", "*", path):
        return None
    return model.get_submodule(parent)


class _UnaskableError(Exception):
    """A block keeps something of a call, or its choice does not depend on the rows alone."""


class _Seen(NamedTuple):
    """A call of one of a block's modules."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def _learn(block: nn.Module, hidden: Tensor, layer: int) -> _Ask:
    """Find out how to ask a block. Raises `_UnaskableError`, or the block's error."""
    with _undone(block):
        rows = hidden.clone()
        call, seen = _observed(block, rows)
        if not isinstance(call, ExpertsCall) or call.layer != layer:
            raise _UnaskableError("the block does not ask for its experts")
        if not torch.equal(call.hidden, hidden):
            raise _UnaskableError("experts and router get different rows")
        own = {id(tensor) for tensor in (*block.parameters(), *block.buffers())}
        routers = (_router(one, call, hidden, own) for one in seen)
        ask = next(filter(None, routers), partial(_ask_block, block))
        if not torch.equal(ask(rows).sort().values, call.index.sort().values) or not torch.equal(rows, hidden):
            raise _UnaskableError("the block changes its input, or chooses differently the second time")
    return ask


def _observed(block: nn.Module, rows: Tensor) -> tuple[Any, list[_Seen]]:
    """Call a block up to its experts; return its experts call and the calls of its modules before that."""
    seen: list[_Seen] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append(_Seen(module, args, kwargs, output))

    others = [child for child in block.children() if not is_seamed(child)]
    hooks = [child.register_forward_hook(note, with_kwargs=True) for child in others]
    try:
        return _call(block, rows), seen
    finally:
        for hook in hooks:
            hook.remove()


def _call(block: nn.Module, rows: Tensor) -> Any:
    forward = Forward(partial(block, rows[None]))
    try:
        return forward.send()
    finally:
        forward.close()


def _router(seen: _Seen, call: ExpertsCall, hidden: Tensor, own: set[int]) -> _Ask | None:
    """Return how to ask the module itself, if it made the choice of the rows and of the block's `own` tensors."""
    outputs = seen.output if isinstance(seen.output, tuple) else (seen.output,)
    place = _place(outputs, call.index)
    if place is None or not seen.args:
        return None
    rows, *others = seen.args
    if any(isinstance(one, Tensor) and id(one) not in own for one in (*others, *seen.kwargs.values())):
        return None
    if rows.shape not in {hidden.shape, hidden[None].shape} or not torch.equal(rows.reshape(hidden.shape), hidden):
        return None
    module, kwargs, batched = seen.module, seen.kwargs, rows.dim() > hidden.dim()
    by = _place(outputs, call.weights)

    def ask(hidden: Tensor) -> Tensor:  # keeps none of the rows seen
        output = module(hidden[None] if batched else hidden, *others, **kwargs)
        index: Tensor = output[place] if isinstance(output, tuple) else output
        return index if by is None else _ranked(index, output[by])

    return ask


def _ask_block(block: nn.Module, hidden: Tensor) -> Tensor:
    call = _call(block, hidden)
    return _ranked(call.index, call.weights)


def _place(outputs: tuple[Any, ...], tensor: Tensor) -> int | None:
    return next((i for i, output in enumerate(outputs) if output is tensor), None)


def _ranked(index: Tensor, weights: Tensor) -> Tensor:
    """Return `index` `[T, K]` by falling weight: many routers let `topk` name them in any order."""
    return index.gather(-1, weights.argsort(dim=-1, descending=True, stable=True))


@contextmanager
def _undone(block: nn.Module) -> Generator[None]:
    """Undo changes that the calls inside make to a block; raises `_UnaskableError` if there were any.

    The random numbers it draws are not put back: the generator is the process's, and other threads draw from it.
    """
    attributes = [(vars(module), dict(vars(module))) for module in block.modules()]
    attributes += [(module._buffers, dict(module._buffers)) for module in block.modules()]
    values = [(buffer, buffer.clone()) for buffer in block.buffers()]
    kept = False
    try:
        yield
    finally:
        for now, before in attributes:
            kept |= _put_back(now, before)
        for buffer, value in values:
            if not torch.equal(buffer, value):
                buffer.copy_(value)
                kept = True
    if kept:
        raise _UnaskableError("the block keeps something of a call")


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Undo changes of a module's attributes; whether there were any."""
    if now.keys() == before.keys() and all(now[name] is value for name, value in before.items()):
        return False
    now.clear()
    now.update(before)
    return True
