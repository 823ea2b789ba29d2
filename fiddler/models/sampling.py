"""One request's generation options, and the token picked from its logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig

from fiddler.errors import GenerationError

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
_HANDLED = frozenset({*_SAMPLING, "do_sample", "max_new_tokens", "max_length", "eos_token_id", "stop_strings"}) | {
    "repetition_penalty",
    "logprobs",
}
_HARMLESS = frozenset(
    {"pad_token_id", "bos_token_id", "use_cache", "transformers_version", "return_dict_in_generate"}
)
"""Set in many checkpoints, without a meaning here."""
_NEUTRAL_ONE = frozenset(
    {
        "encoder_repetition_penalty",
        "guidance_scale",
        "length_penalty",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "typical_p",
    }
)
"""Options that do nothing at 1; every other one does nothing where it is unset, off, 0 or empty."""
_NUMBERS: tuple[tuple[str, float, float, bool], ...] = (
    ("temperature", 0, inf, False),
    ("top_k", 0, inf, True),
    ("top_p", 0, 1, False),
    ("min_p", 0, 1, False),
    ("max_new_tokens", 1, inf, True),
    ("max_length", 1, inf, True),
    ("seed", -(1 << 63), (1 << 64) - 1, True),
)
"""Name, lowest and highest value, and whether only whole numbers make sense."""


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """What one request asked for, with nothing left to be looked up.

    `temperature` 0.0 is greedy. `max_new_tokens` `None` is as many as the context holds.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


def read_options(
    default: GenerationConfig, generation: GenerationConfig | None, overrides: dict[str, Any]
) -> SamplingOptions:
    """Merge the model's defaults, a request's `GenerationConfig` and its keyword overrides, the later ones winning.

    Sampling is on where `do_sample` says so, and, if the request leaves `do_sample` unset, where it sets any of
    temperature, top_k, top_p, min_p or seed; temperature 0 is always greedy. `max_new_tokens`, `seed` and
    `logprobs` are the options most used as overrides. Raises `GenerationError` naming an unknown or unsupported
    option or an impossible value.
    """
    known = set(GenerationConfig().to_dict()) | {"seed", "logprobs"}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise GenerationError(f"unknown generation option {', '.join(unknown)}")
    asked = {**(_set_fields(generation) if generation is not None else {}), **overrides}
    merged = {**{k: v for k, v in _set_fields(default).items() if k in _HANDLED}, **asked}
    for name, value in asked.items():
        if name not in _HANDLED | _HARMLESS and not name.startswith("_") and not _is_neutral(name, value):
            raise GenerationError(
                f"{name}={value!r} is not supported by the engine; "
                "model = fiddler.attach(path); model.generate(...) takes every option of transformers"
            )
    _check(merged)
    return _options(merged, sample=_samples(asked, merged))


def _is_neutral(name: str, value: Any) -> bool:
    if name in _NEUTRAL_ONE:
        return value is None or value == 1
    if name.endswith("_token_id"):  # 0 is a token
        return value is None
    return value in (None, False, (), [], {})


def _set_fields(generation: GenerationConfig) -> dict[str, Any]:
    return {k: v for k, v in generation.to_dict().items() if v is not None}


def _samples(asked: dict[str, Any], merged: dict[str, Any]) -> bool:
    if asked.get("do_sample") is not None:
        return bool(asked["do_sample"])
    return bool(merged.get("do_sample")) or any(asked.get(name) is not None for name in _SAMPLING)


def _check(merged: dict[str, Any]) -> None:
    for name, low, high, whole in _NUMBERS:
        value = merged.get(name)
        if value is not None and not (_is_number(value, whole=whole) and low <= value <= high):
            kind = "a whole number" if whole else "a number"
            raise GenerationError(f"{name}={value!r} must be {kind} from {low:g} to {high:g}")
    penalty = merged.get("repetition_penalty")
    if penalty is not None and not (_is_number(penalty, whole=False) and 0 < penalty < inf):
        raise GenerationError(f"repetition_penalty={penalty!r} must be a number above 0")
    stop = merged.get("stop_strings")
    if not all(isinstance(s, str) and s for s in _listed(stop)):
        raise GenerationError(f"stop_strings={stop!r} must be non-empty strings")
    eos = merged.get("eos_token_id")
    if not all(_is_number(i, whole=True) for i in _listed(eos)):
        raise GenerationError(f"eos_token_id={eos!r} must be a token id or several")


def _is_number(value: Any, *, whole: bool) -> bool:
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)


def _listed(value: Any) -> tuple[Any, ...]:
    """Return one value or several as a tuple; `None` is none."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple | set | frozenset) else (value,)


def _options(merged: dict[str, Any], *, sample: bool) -> SamplingOptions:
    temperature = merged.get("temperature")
    return SamplingOptions(
        temperature=float(1.0 if temperature is None else temperature) if sample else 0.0,
        top_k=merged.get("top_k") or None,
        top_p=merged.get("top_p"),
        min_p=merged.get("min_p"),
        repetition_penalty=merged.get("repetition_penalty"),
        seed=merged.get("seed"),
        max_new_tokens=merged.get("max_new_tokens"),
        max_length=merged.get("max_length"),
        eos_token_ids=frozenset(_listed(merged.get("eos_token_id"))),
        stop_strings=_listed(merged.get("stop_strings")),
        logprobs=bool(merged.get("logprobs")),
    )


class Sampler:
    """Picks one request's tokens; the order of processors is transformers' own."""

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        self._penalty = _penalty(options)
        self._warpers = _warpers(options)
        self._random = torch.Generator()
        if options.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(options.seed)

    def pick(self, logits: Tensor, context: Sequence[int]) -> tuple[int, float | None]:
        """Return a token id and, if asked for, its log-probability, from `logits` `[V]` after `context`.

        Raises `FloatingPointError` for logits that no softmax can be taken of.
        """
        scores = logits.float()[None]  # [1, V]
        _check_logits(scores)
        if self._penalty is not None:
            scores = self._penalty(torch.tensor([context]), scores)
        for warper in self._warpers:
            scores = warper(None, scores)
        token = int(scores[0].argmax()) if self._options.greedy else self._draw(scores[0].softmax(-1))
        return token, float(scores[0].log_softmax(-1)[token]) if self._options.logprobs else None

    def _draw(self, probabilities: Tensor) -> int:
        """Draw from `[V]` by inverting the distribution: 25 times faster than `multinomial` for 150k tokens."""
        cumulative = probabilities.cumsum(-1)
        if not cumulative[-1] > 0:
            raise ValueError("the logits give no token a probability")
        at = torch.rand(1, generator=self._random) * cumulative[-1]
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


def _penalty(options: SamplingOptions) -> transformers.LogitsProcessor | None:
    if options.repetition_penalty in (None, 1.0):
        return None
    return transformers.RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty or 1.0))


def _warpers(options: SamplingOptions) -> list[Any]:
    if options.greedy:
        return []
    warpers: list[Any] = []
    if options.temperature != 1.0:
        warpers.append(transformers.TemperatureLogitsWarper(options.temperature))
    if options.top_k is not None:
        warpers.append(transformers.TopKLogitsWarper(options.top_k))
    if options.top_p is not None and options.top_p < 1.0:
        warpers.append(transformers.TopPLogitsWarper(options.top_p))
    if options.min_p is not None and options.min_p > 0.0:
        warpers.append(transformers.MinPLogitsWarper(options.min_p))
    return warpers
