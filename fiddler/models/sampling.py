"""Picks a token from one request's logits, as transformers would."""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from fiddler.errors import GenerationError
from fiddler.models.generation import SamplingOptions, named
from fiddler.models.options import logits_processors


class Sampler:
    """Picks one request's tokens. The rest of the process cannot change the choice: every dtype and device is
    explicit.

    `n_most` is the longest the sequence may become, in tokens, prompt included.
    """

    def __init__(self, options: SamplingOptions, prompt_ids: Sequence[int], n_most: int) -> None:
        self._options = options
        self._processors = logits_processors(
            options.processors,
            prompt_ids,
            sample=options.sample,
            n_most=n_most,
            eos_token_ids=sorted(options.eos_token_ids),
            n_vocabulary=options.n_vocabulary,
        )
        self._ids = torch.empty(1, 0, dtype=torch.int64, device="cpu")  # of the context, as far as it was seen
        self._random = torch.Generator(device="cpu")
        if options.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(options.seed)

    def pick(self, logits: Tensor, context: Sequence[int]) -> tuple[int, float | None]:
        """Return a token id and, if asked for, its log-probability, from `logits` `[V]` after `context`.

        Raises `GenerationError` where the options leave no token a probability, and `FloatingPointError` for logits
        that no softmax can be taken of, unless `remove_invalid_values` mends them.
        """
        raw = logits.to(device="cpu", dtype=torch.float32)
        if "remove_invalid_values" not in self._options.processors:
            _check_logits(raw)
        scores = self._processed(raw, context) if self._processors else raw
        token = self._draw(scores.softmax(-1)) if self._options.sample else _likeliest(scores)
        if token is None:
            said = named(self._options.processors)
            raise GenerationError(f"the options leave no token a probability: {said}")
        return token, float(scores.log_softmax(-1)[token]) if self._options.logprobs else None

    def _processed(self, raw: Tensor, context: Sequence[int]) -> Tensor:
        new = torch.tensor([context[self._ids.shape[1] :]], dtype=torch.int64, device="cpu")
        self._ids = torch.cat((self._ids, new), dim=1)
        scores = raw[None]  # [1, V]
        try:
            for processor in self._processors:
                scores = processor(self._ids, scores)
        except Exception as error:  # of values that only now turn out to be impossible
            raise GenerationError(f"{named(self._options.processors)}: {error}") from error
        return scores[0]

    def _draw(self, probabilities: Tensor) -> int | None:
        """Draw from `[V]` by inverting the distribution: 25 times faster than `multinomial` for 150k tokens."""
        cumulative = probabilities.cumsum(-1)
        if not cumulative[-1] > 0:
            return None
        at = torch.rand(1, generator=self._random, dtype=torch.float32, device="cpu") * cumulative[-1]
        # Right of equal values, so that a token of probability zero is never drawn.
        token = int(torch.searchsorted(cumulative, at, right=True))
        return min(token, int(probabilities.nonzero()[-1]))


def _check_logits(logits: Tensor) -> None:
    """Raise `FloatingPointError` unless the highest is finite: it is NaN where any of them is."""
    highest = float(logits.max())
    if not isfinite(highest):
        raise FloatingPointError(
            f"the model's logits are not numbers (the highest is {highest}): its weights may be damaged, or "
            "activations overflow, as float16's do above 65504; dtype='bfloat16' or dtype='float32' reaches further"
        )


def _likeliest(scores: Tensor) -> int | None:
    highest, token = scores.max(-1)  # the first of several; what is no number counts as the highest
    return int(token) if float(highest) > -torch.inf else None
