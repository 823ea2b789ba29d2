"""A program that opens an engine and watches what holds for its whole process, meanwhile and after.

Prints what changed, as JSON. Run by `test_process_state.py` in a process of its own.
"""

import json
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import torch
import transformers
from transformers.utils import logging as transformers_logging

from fiddler import Engine, EngineConfig


def loggers() -> dict[str, Any]:
    found: dict[str, Any] = {"": logging.getLogger(), **logging.Logger.manager.loggerDict}
    return {
        name: (each.level, each.propagate, each.disabled, ids(each.handlers), ids(each.filters))
        for name, each in found.items()
        if isinstance(each, logging.Logger)
    }


def ids(things: Any) -> list[int]:
    return [id(thing) for thing in things]


def in_new_thread(ask: Callable[[], int]) -> int:
    said: list[int] = []
    thread = threading.Thread(target=lambda: said.append(ask()))
    thread.start()
    thread.join()
    return said[0]


def steady() -> dict[str, Any]:
    """What never changes, also not while an engine opens."""
    return {
        "loggers": loggers(),
        "logging.disable": logging.root.manager.disable,
        "warnings": [str(each) for each in warnings.filters],
        "showwarning": id(warnings.showwarning),
        "verbosity": transformers.logging.get_verbosity(),
        "bars": (transformers.logging.is_progress_bar_enabled(), id(transformers_logging._tqdm_hook)),
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "locale": locale.setlocale(locale.LC_ALL),
        "path": list(sys.path),
        "streams": ids((sys.stdout, sys.stderr, sys.stdin)),
        "hooks": ids((sys.excepthook, threading.excepthook, sys.unraisablehook)),
        "interpreter": (sys.getrecursionlimit(), sys.getswitchinterval()),
        "random": hash(random.getstate()),
        "numpy": str(np.random.get_state()),
        "torch": hash(torch.get_rng_state().numpy().tobytes()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "denormal": float(torch.tensor(1e-39, dtype=torch.float32) * 1.0),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "mkldnn": torch.backends.mkldnn.enabled,
        "pool": torch.get_num_interop_threads(),
    }


def whole() -> dict[str, Any]:
    """What else is the same before and after; transformers changes the default dtype and more while it loads."""
    return steady() | {
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": (torch.get_num_threads(), in_new_thread(torch.get_num_threads)),
        "grad": torch.is_grad_enabled(),
        "signals": [str(signal.getsignal(each)) for each in sorted(signal.valid_signals())],
        "transformers": ids((transformers.PreTrainedModel.tie_weights, torch.linspace, torch.nn.init.normal_)),
    }


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in before if before[key] != now[key])


class Watch(threading.Thread):
    """Looks again and again, from a thread of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.n, self.changed, self.stop = steady(), 0, set[str](), threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.003):
            self.changed.update(differing(self.before, steady()))
            self.n += 1


async def main(folder: str) -> dict[str, Any]:
    before, watch = whole(), Watch()
    watch.start()
    async with Engine(folder, EngineConfig(threads=3)) as engine:
        states = [whole()]
        await engine.generate("Once", max_new_tokens=5, seed=1, do_sample=True)
        states.append(whole())
    states.append(whole())
    watch.stop.set()
    watch.join()
    changes = [differing(before, state) for state in states]
    return {"n": watch.n, "meanwhile": sorted(watch.changed), "changes": changes}


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.INFO)
    warnings.simplefilter("error")
    torch.set_num_threads(2)
    random.seed(1)
    torch.manual_seed(1)
    anyio.run(main, sys.argv[1])  # once for nothing: modules imported on the way bring loggers of their own
    print(json.dumps(anyio.run(main, sys.argv[1])))
