"""Builds one transformers model at a time, without warnings about the experts that we keep out.

While it builds or loads one, transformers changes torch's default dtype, `torch.linspace`, `torch.nn.init` and a
method of its own models, for every thread, and changes them back. Two loads at once would see each other's changes,
and might leave them behind. So all loads take turns, those of the program itself too; a child that is forked
meanwhile has the changes undone.

The program's settings are left alone: logging levels, warnings filters, the switch of the progress bars. A filter
that is installed from the beginning drops messages of the thread that loads for us.
"""

import functools
import logging
import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

_one = threading.RLock()
_mine = threading.local()
_found: dict[tuple[Any, str], Any] = {}
"""Settings that the load under way may have changed, as they were before."""

_CHANGED = ((PreTrainedModel, "tie_weights"), (torch, "linspace"))
_LOGGERS = ("modeling_utils", "core_model_loading", "integrations.hub_kernels")
"""Loggers that report unexpected weights, or slower code paths, on loading."""


@contextmanager
def alone() -> Generator[None]:
    """Build or load models of transformers, one thread after the other, quietly, and on the CPU.

    The thread's own settings, a default device or inference mode, do not apply inside.
    """
    with _turn(), torch.inference_mode(False), torch.device("cpu"):
        getattr(_mine, "check", _wanted)()
        outer = _quiet()
        _mine.quiet = True
        try:
            yield
        finally:
            _mine.quiet = outer


def check_before(check: Callable[[], None]) -> None:
    """Call `check` before this thread's turn to load; it raises if nobody wants the load any more."""
    _mine.check = check


def _wanted() -> None:
    """Check nothing."""


@contextmanager
def _turn() -> Generator[None]:
    with _one:
        if outermost := not _found:
            _found.update({(where, name): getattr(where, name) for where, name in _CHANGED})
            _found[torch, "dtype"] = torch.get_default_dtype()
        try:
            yield
        finally:
            if outermost:
                _found.clear()


def _in_turn(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that waits for its turn."""

    @functools.wraps(method)
    def waits(*args: Any, **options: Any) -> Any:
        with _turn():
            return method(*args, **options)

    return waits


def _contexts(method: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Return a method that enters the contexts a model is built in, the turn first."""
    return functools.wraps(method)(lambda *args, **options: [_turn(), *method(*args, **options)])


def _forked() -> None:
    """Undo the changes of a parent's loading thread, which does not run in this child."""
    global _one
    if _one.acquire(blocking=False):
        _one.release()
        return
    _one = threading.RLock()
    torch.set_default_dtype(_found.pop((torch, "dtype")))
    while _found:
        (where, name), before = _found.popitem()
        setattr(where, name, before)


def _quiet() -> bool:
    """Whether this thread loads for us."""
    return getattr(_mine, "quiet", False)


def _heard(record: logging.LogRecord) -> bool:
    """Drop the warnings of our own loading; a filter runs in the thread that logs."""
    return record.levelno >= logging.ERROR or not _quiet()


Bar = Callable[..., Any]


def _bar(make: Bar, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Make a progress bar, as it would be made without us; an empty one for our own loading."""
    if _quiet():
        return transformers_logging.EmptyTqdm(*args, **options)
    return _before(make, args, options) if _before is not None else make(*args, **options)


for _name in _LOGGERS:
    logging.getLogger(f"transformers.{_name}").addFilter(_heard)
_before = transformers_logging.set_tqdm_hook(_bar)
for _name, _waiting in (("get_init_context", _contexts), ("_from_config", _in_turn)):
    setattr(PreTrainedModel, _name, classmethod(_waiting(getattr(PreTrainedModel, _name).__func__)))
PreTrainedModel.initialize_weights = _in_turn(PreTrainedModel.initialize_weights)  # type: ignore[method-assign]
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
