"""Ways of running the demo model, and what each promises of its predictions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from bench import quality_forced as forced
from bench.quality_forced import Texts
from fiddler.config import EngineConfig

Promise = Literal["same bits", "rounding", "lossy"]
"""The same bits hold for one dtype, one stored calibration and the same rows in a wave, wherever experts run."""

BASE = "cpu"
ROUNDING = 0.005
"""Relative change of the perplexity; seen were at most 0.0013, of float16."""
EXACT = 1e-5
"""In float32, where roundings hardly show; seen was less than 1e-6."""
LOSS = 0.05
"""Half of all visits a layer late; seen were 0.032."""
CHUNK = 16
FLOAT32 = EngineConfig(device="cpu", dtype="float32")
SIM, VIRTUAL = "sim", "sim:rtx4090-desktop"
ALL = 6 * 16
"""Experts of the demo model."""


@dataclass(frozen=True, slots=True)
class Path:
    """One way of reading texts, and its promise relative to the path named `like`."""

    read: Callable[[Texts], Tensor]
    promise: Promise
    bound: float = 0.0
    like: str = BASE
    chunk: int = 1
    """Tokens of each text a step; only the tokens after chunks are predicted."""


def _same(like: str = BASE, **options: Any) -> Path:
    return Path(_engine(**options), "same bits", like=like)


def _rounded(**options: Any) -> Path:
    return Path(_engine(device="cpu", **options), "rounding", ROUNDING)


def _engine(**options: Any) -> Callable[[Texts], Tensor]:
    # Beside an accelerator two waves may be chosen, which are other rows in a wave.
    return partial(forced.by_engine, config=EngineConfig(**{"waves": "one", **options}))


def _exact(read: Callable[[Texts], Tensor], chunk: int = 1) -> Path:
    return Path(read, "rounding", EXACT, like="cpu, float32", chunk=chunk)


PATHS: dict[str, Path] = {
    BASE: _same(device="cpu"),
    "cpu, packed": _same(device="cpu", store="packed"),
    "cpu, kernels linear": _rounded(kernels="linear"),
    "cpu, two waves": _rounded(waves="two"),
    "cpu, float32": _rounded(dtype="float32"),
    "cpu, float16": _rounded(dtype="float16"),
    "cpu, float32, in chunks": _exact(partial(forced.by_engine, config=FLOAT32, chunk=CHUNK), CHUNK),
    "cpu, one of two experts deferred": Path(
        partial(forced.by_engine, config=EngineConfig(device="cpu"), defer=1), "lossy", LOSS
    ),
    "sim, a quarter resident": _same(device=SIM),
    "sim, no prefetch": _same(device=SIM, prefetch="off"),
    "virtual, a quarter resident": _same(device=VIRTUAL),
    "virtual, no prefetch": _same(device=VIRTUAL, prefetch="off"),
    "virtual, none resident": _same(device=VIRTUAL, slots=0),
    "virtual, all resident": _same(device=VIRTUAL, slots=ALL),
    "virtual, two waves": _same("cpu, two waves", device=VIRTUAL, waves="two"),
    "virtual, float32": _same("cpu, float32", device=VIRTUAL, dtype="float32"),
    "virtual, float16": _same("cpu, float16", device=VIRTUAL, dtype="float16"),
    "attached to transformers": Path(partial(forced.attached, config=EngineConfig()), "rounding", ROUNDING),
    "attached, float32": _exact(partial(forced.attached, config=FLOAT32)),
    "transformers eager": Path(partial(forced.eager, dtype=torch.bfloat16), "rounding", ROUNDING),
    "transformers eager, float32": _exact(partial(forced.eager, dtype=torch.float32)),
}
"""By name, each after the one it is to be like. `sim` is in wall time, `virtual` on a described desktop."""
