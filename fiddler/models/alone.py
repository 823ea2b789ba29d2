"""transformers builds one model at a time, and says nothing of the experts that we keep out.

While it builds or loads one, transformers changes torch's default dtype, `torch.linspace`, `torch.nn.init` and a
method of its own models, for every thread, and changes them back. Two loads at once would see each other's changes,
and might leave them behind. What the program set is left alone: logging levels, warnings filters, the switch of the
progress bars. To be quiet, a filter that is there from the beginning knows which thread loads for us.
"""

import logging
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

_one = threading.RLock()
_mine = threading.local()

_LOGGERS = ("modeling_utils", "core_model_loading", "integrations.hub_kernels")
"""Loggers that report unexpected weights, or slower code paths, on loading."""


@contextmanager
def alone() -> Generator[None]:
    """Build or load models of transformers, one thread after the other, quietly, and on the CPU.

    What the thread has set for itself, a default device or inference mode, does not reach in.
    """
    with _one, torch.inference_mode(False), torch.device("cpu"):
        outer = _quiet()
        _mine.quiet = True
        try:
            yield
        finally:
            _mine.quiet = outer


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
