"""A transformers model under the stopwatch, in the leanest loop one can write.

Not `model.generate()` but for beams: a bare loop of forward and argmax over a `DynamicCache` is faster, and the
fastest peer is the fair one.
"""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from bench.peers.peer import Picks, Tokens, timed
from bench.workload import Run, UnavailableError, Workload


def run(
    model: PreTrainedModel,
    workload: Workload,
    prompts: Tokens,
    made: Tokens,
    patience_s: float,
    after_prompt: Callable[[], None] = lambda: None,
) -> Run:
    """Run a workload, see `Peer`; without beams, `after_prompt` is called between prompt and decoding.

    Raises `UnavailableError` where transformers fails: the other systems go on.
    """
    try:
        with torch.inference_mode():
            if workload.n_beams > 1:
                return _searched(model, workload, prompts, patience_s)
            return _fed(model, workload, prompts, made, patience_s, after_prompt)
    except (RuntimeError, ValueError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise UnavailableError(f"{type(error).__name__}: {reason}") from error


def _fed(
    model: PreTrainedModel,
    workload: Workload,
    prompts: Tokens,
    made: Tokens,
    patience_s: float,
    after_prompt: Callable[[], None],
) -> Run:
    """Run a workload on the tokens that are to be made."""
    cache = DynamicCache(config=model.config)
    first = torch.tensor(prompts)  # [B, n_input]
    rest = torch.tensor(made)  # [B, n_output]

    def prompt() -> Picks:
        picks = _forward(model, cache, first)
        after_prompt()
        return picks

    return timed(prompt, lambda i: _forward(model, cache, rest[:, i, None]), workload.n_output, patience_s)


def _forward(model: Callable[..., Any], cache: DynamicCache, ids: Tensor) -> Picks:
    """Run one forward and pick each sequence's next token."""
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    picks: Picks = logits[:, -1].argmax(-1).tolist()
    return picks


def _searched(model: Any, workload: Workload, prompts: Tokens, patience_s: float) -> Run:
    """Run a workload by transformers' own beam search, which makes its own tokens."""
    ids = torch.tensor(prompts)  # [B, n_input]
    # What generate() is not given it takes from here, and the model's end token would end the search.
    model.generation_config = GenerationConfig()
    options = GenerationConfig(
        num_beams=workload.n_beams,
        do_sample=False,
        min_new_tokens=workload.n_output,
        max_new_tokens=workload.n_output,
    )
    watch = _Watch(patience_s)
    started = perf_counter()
    sequences: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=options, stopping_criteria=[watch]
    )
    ended = perf_counter()
    first = watch.times[0]
    tokens = tuple(tuple(made) for made in sequences[:, ids.shape[1] :].tolist())
    decode_s = ended - first if len(watch.times) > 1 else 0.0
    return Run(first - started, decode_s, len(tokens), len(watch.times), tokens)


class _Watch:
    """A stopping criterion that notes when each step ended, and stops the search when patience is lost."""

    def __init__(self, patience_s: float) -> None:
        self.times: list[float] = []
        self._patience_s = patience_s

    def __call__(self, ids: Tensor, scores: object, **_: object) -> Tensor:
        self.times.append(perf_counter())
        lost = len(self.times) > 1 and self.times[-1] - self.times[0] > self._patience_s
        return torch.full((ids.shape[0],), lost)
