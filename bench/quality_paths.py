"""Ways of having the demo model read texts, and what each promises of its predictions.

Log-probabilities are natural logarithms, `[texts, tokens]` float32: of each text's tokens but the first or, of a
text read in chunks, of the token after each chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

import fiddler
from fiddler import DEMO
from fiddler.calibration.kernels import choose_kernels
from fiddler.config import EngineConfig
from fiddler.devices.kernels import Kernels
from fiddler.engine import assembly
from fiddler.models import dense
from fiddler.models.kv import SequenceKV
from fiddler.models.loaded import ServableModel, load
from fiddler.scheduler.waves import RowSpan
from fiddler.steps.step import Outcome

Promise = Literal["same bits", "rounding", "lossy"]
"""The same bits hold for one dtype, one stored calibration and the same rows in a wave, wherever experts run."""

BASE = "cpu"
ROUNDING = 0.005
"""Relative change of the perplexity; seen were at most 0.0013, of float16."""
EXACT = 1e-5
"""In float32, where roundings hardly show; seen was less than 1e-6."""
LOSS = 0.05
"""Half of all visits a layer late; seen were 0.032."""
INT8, INT4 = 0.005, 0.03
"""Experts quantised to nearest; seen were 0.0008 and 0.0077."""
CHUNK = 16
FLOAT32 = EngineConfig(device="cpu", dtype="float32")
SIM, VIRTUAL = "sim", "sim:rtx4090-desktop"
ALL = 6 * 16
"""Experts of the demo model."""
Texts = Sequence[list[int]]
"""Token ids, equally many of each."""


@dataclass(slots=True, eq=False)
class _Forced:
    """A sequence whose tokens are known: all that a step needs of a request."""

    ids: list[int]
    past: SequenceKV = field(default_factory=SequenceKV)
    n_prompt: int = 0
    """Tokens of a prompt, which would count whole: none, each is read as if it was made."""

    def tokens(self, start: int, stop: int) -> list[int]:
        return self.ids[start:stop]


def by_engine(texts: Texts, config: EngineConfig, *, chunk: int = 1, defer: int = 0) -> Tensor:
    """Read the texts side by side, `chunk` tokens of each a step, through all that an engine's steps go through.

    `defer` is `EngineConfig.defer`, also where the engine would refuse it. Raises what a step fails with.
    """
    return _by_engine(texts, config, chunk, defer)


def _by_engine(texts: Texts, config: EngineConfig, chunk: int, defer: int) -> Tensor:
    loaded = load(DEMO, config)
    kernels = choose_kernels(loaded, config)
    dense.accelerate(loaded.model, kernels)
    machine = _machine(loaded, kernels, config, defer)
    machine.runner.preload()
    sequences: list[Any] = [_Forced(ids) for ids in texts]
    read = []
    for start in range(0, len(texts[0]) - chunk, chunk):
        stop = start + chunk
        outcomes = machine.steps.run([RowSpan(one, start, stop, last=True) for one in sequences])
        read.append([_logprob(outcome, one.ids[stop]) for one, outcome in zip(sequences, outcomes, strict=True)])
    machine.close()
    return torch.tensor(read).t()


def _machine(loaded: ServableModel, kernels: Kernels, config: EngineConfig, defer: int) -> assembly.Rig:
    # What is refused for its quality is what has to be measured.
    with patch.object(assembly, "DEFER_FROM", 1):
        return assembly.assemble_rig(loaded, kernels, replace(config, defer=defer))


def _logprob(outcome: Outcome, token: int) -> float:
    if outcome.error is not None:
        raise outcome.error
    assert outcome.logits is not None
    return float(outcome.logits.float().log_softmax(-1)[token])


def attached(texts: Texts, config: EngineConfig) -> Tensor:
    """Read each text in one forward of transformers' model over Fiddler's experts."""
    return _whole(fiddler.attach(DEMO, config), texts)


def eager(texts: Texts, dtype: torch.dtype) -> Tensor:
    """Read each text in one forward of transformers' own plainest code."""
    transformers.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        DEMO, dtype=dtype, attn_implementation="eager", experts_implementation="eager", local_files_only=True
    )
    return _whole(model.eval(), texts)


def _whole(model: Any, texts: Texts) -> Tensor:
    ids = torch.tensor(texts)  # [B, T]
    logits = model(ids, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
    read: Tensor = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return read


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


def _quantised(to: str, bound: float) -> Path:
    return Path(_engine(device="cpu", expert_dtype=to), "lossy", bound)


def _engine(**options: Any) -> Callable[[Texts], Tensor]:
    # Beside an accelerator two waves may be chosen, which are other rows in a wave.
    return partial(by_engine, config=EngineConfig(**{"waves": "one", **options}))


def _exact(read: Callable[[Texts], Tensor], chunk: int = 1) -> Path:
    return Path(read, "rounding", EXACT, like="cpu, float32", chunk=chunk)


PATHS: dict[str, Path] = {
    BASE: _same(device="cpu"),
    "cpu, packed": _same(device="cpu", store="packed"),
    "cpu, kernels linear": _rounded(kernels="linear"),
    "cpu, two waves": _rounded(waves="two"),
    "cpu, float32": _rounded(dtype="float32"),
    "cpu, float16": _rounded(dtype="float16"),
    "cpu, float32, in chunks": _exact(partial(by_engine, config=FLOAT32, chunk=CHUNK), CHUNK),
    "cpu, one of two experts deferred": Path(
        partial(by_engine, config=EngineConfig(device="cpu"), defer=1), "lossy", LOSS
    ),
    "cpu, experts in int8": _quantised("int8", INT8),
    "cpu, experts in int4": _quantised("int4", INT4),
    "sim, experts in int4": _same("cpu, experts in int4", device=SIM, expert_dtype="int4"),
    "sim, a quarter resident": _same(device=SIM),
    "sim, no prefetch": _same(device=SIM, prefetch="off"),
    "virtual, a quarter resident": _same(device=VIRTUAL),
    "virtual, no prefetch": _same(device=VIRTUAL, prefetch="off"),
    "virtual, none resident": _same(device=VIRTUAL, slots=0),
    "virtual, all resident": _same(device=VIRTUAL, slots=ALL),
    "virtual, two waves": _same("cpu, two waves", device=VIRTUAL, waves="two"),
    "virtual, float32": _same("cpu, float32", device=VIRTUAL, dtype="float32"),
    "virtual, float16": _same("cpu, float16", device=VIRTUAL, dtype="float16"),
    "attached to transformers": Path(partial(attached, config=EngineConfig()), "rounding", ROUNDING),
    "attached, float32": _exact(partial(attached, config=FLOAT32)),
    "transformers eager": Path(partial(eager, dtype=torch.bfloat16), "rounding", ROUNDING),
    "transformers eager, float32": _exact(partial(eager, dtype=torch.float32)),
}
"""By name, each after the one it is to be like. `sim` is in wall time, `virtual` on a described desktop."""
