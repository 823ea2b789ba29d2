"""The demo model is made to read texts, by each way there is; what it gave every token is returned.

Log-probabilities are natural logarithms, `[texts, tokens]` float32: of each text's tokens but the first or, of a
text read in chunks, of the token after each chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import anyio
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

import fiddler
from fiddler import DEMO
from fiddler.config import EngineConfig
from fiddler.devices.kernels import Kernels
from fiddler.engine import rig
from fiddler.engine.assemble import Span
from fiddler.engine.forward import Outcome
from fiddler.engine.setup import choose_kernels
from fiddler.models import dense
from fiddler.models.kv import SequenceKV
from fiddler.models.loaded import ServableModel, load

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
    return anyio.run(_by_engine, texts, config, chunk, defer)


async def _by_engine(texts: Texts, config: EngineConfig, chunk: int, defer: int) -> Tensor:
    loaded = load(DEMO, config)
    kernels = choose_kernels(loaded, config)
    dense.accelerate(loaded.model, kernels)
    machine = _machine(loaded, kernels, config, defer)
    await machine.runner.preload()
    sequences: list[Any] = [_Forced(ids) for ids in texts]
    read = []
    for start in range(0, len(texts[0]) - chunk, chunk):
        stop = start + chunk
        outcomes = await machine.steps.run([Span(one, start, stop, last=True) for one in sequences])
        read.append([_logprob(outcome, one.ids[stop]) for one, outcome in zip(sequences, outcomes, strict=True)])
    await machine.aclose()
    return torch.tensor(read).t()


def _machine(loaded: ServableModel, kernels: Kernels, config: EngineConfig, defer: int) -> rig.Rig:
    # What is refused for its quality is what has to be measured.
    with patch.object(rig, "DEFER_FROM", 1):
        return rig.assemble_rig(loaded, kernels, replace(config, defer=defer))


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
