"""The training loop."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import Qwen3MoeForCausalLM

from tools.demo import dispatch
from tools.demo.model import TRAINED_CONTEXT
from tools.demo.muon import Muon
from tools.demo.windows import batches

TOKENS_A_BATCH = 8192
# Short windows are cheaper, and most of what there is to learn is local; the rest of the time goes to long ones.
SHORT_CONTEXT, SHORT_SHARE = 256, 0.85
WARM_UP_STEPS, DECAY = 60, 0.6
MATRIX_RATE, VECTOR_RATE = 0.02, 0.004
WEIGHT_DECAY = 0.05
# Just enough to keep every expert in use, over the mixture of domains in a batch and not within a domain.
BALANCE = 0.015
SNAPSHOT_SECONDS = 300.0
SEED = 1


@dataclass
class Progress:
    """What has been done so far."""

    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    loss: float = float("nan")


def train(
    model: Qwen3MoeForCausalLM,
    documents: list[np.ndarray],
    minutes: float,
    state: Path,
    on_snapshot: Callable[[], None],
) -> Progress:
    """Train for ``minutes``, continuing from the file ``state`` where there is one.

    The learning rate follows the clock, so a busy machine makes fewer steps rather than a longer run.
    """
    dispatch.register()
    model.set_experts_implementation(dispatch.NAME)
    optimizers = _optimizers(model)
    progress = _resume(state, model, optimizers)
    loss_of = _loss_function(model)
    limit, last_snapshot = minutes * 60, progress.seconds
    source: tuple[int, Iterator[torch.Tensor]] = (0, iter(()))
    clock = time.monotonic() - progress.seconds
    while progress.seconds < limit:
        done = progress.seconds / limit
        context = SHORT_CONTEXT if done < SHORT_SHARE else TRAINED_CONTEXT
        if source[0] != context:
            # Else the graphs for the other length count against the number that the compiler keeps.
            torch.compiler.reset()
            source = (context, batches(documents, context, TOKENS_A_BATCH, SEED + progress.steps))
        loss, balance = _step(loss_of, optimizers, next(source[1]), rate(done, progress.steps))
        progress.steps += 1
        progress.tokens += TOKENS_A_BATCH
        progress.loss = loss if progress.steps == 1 else 0.98 * progress.loss + 0.02 * loss
        progress.seconds = time.monotonic() - clock
        if progress.steps % 10 == 1:
            _log(progress, context, balance)
        if progress.seconds - last_snapshot > SNAPSHOT_SECONDS or progress.seconds >= limit:
            last_snapshot = progress.seconds
            _save(state, model, optimizers, progress)
            on_snapshot()
    return progress


def rate(done: float, steps: int) -> float:
    """Return the learning rate, as a share of its peak, at a share of the run: up, level, and down to zero."""
    return max(0.0, min((steps + 1) / WARM_UP_STEPS, 1.0, (1 - done) / DECAY))


def balance_loss(router_logits: tuple[torch.Tensor, ...], chosen: int) -> torch.Tensor:
    """Return the mean over layers of the load-balancing loss, which is one for an even load."""
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        experts = probabilities.shape[-1]
        load = F.one_hot(probabilities.topk(chosen).indices, experts).sum(1).float().mean(0) / chosen
        losses.append(experts * (load * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def _loss_function(
    model: Qwen3MoeForCausalLM,
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    def loss_of(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model.model(input_ids=tokens, use_cache=False, output_router_logits=True)
            logits = model.lm_head(output.last_hidden_state[:, :-1])
        text = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        return text, balance_loss(output.router_logits, model.config.num_experts_per_tok)

    # Compiling saves a quarter of the time, and needs a C++ compiler.
    return torch.compile(loss_of, dynamic=False) if shutil.which("g++") else loss_of


def _step(
    loss_of: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    optimizers: list[Optimizer],
    tokens: torch.Tensor,
    scale: float,
) -> tuple[float, float]:
    text, balance = loss_of(tokens)
    (text + BALANCE * balance).backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return text.item(), balance.item()


def _optimizers(model: Qwen3MoeForCausalLM) -> list[Optimizer]:
    """Give the hidden layers' matrices to Muon, and embeddings, routers and norms to AdamW."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim >= 2 and "embed" not in name and ".gate.weight" not in name
        (matrices if hidden else others).append(parameter)
    optimizers = [
        Muon(matrices, lr=MATRIX_RATE, weight_decay=WEIGHT_DECAY),
        AdamW(others, lr=VECTOR_RATE, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _save(state: Path, model: Qwen3MoeForCausalLM, optimizers: list[Optimizer], progress: Progress) -> None:
    content = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": vars(progress),
    }
    partial = state.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(state)


def _resume(state: Path, model: Qwen3MoeForCausalLM, optimizers: list[Optimizer]) -> Progress:
    if not state.exists():
        return Progress()
    content = torch.load(state, weights_only=True)
    model.load_state_dict(content["model"])
    for optimizer, saved in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return Progress(**content["progress"])


def _log(progress: Progress, context: int, balance: float) -> None:
    print(
        f"{progress.seconds:6.0f} s  step {progress.steps:5d}  context {context:4d}  "
        f"loss {progress.loss:.4f}  balance {balance:.3f}",
        flush=True,
    )
