"""Every generation option the engine honours: how its value is read, and the logits processors made of them.

The processors are transformers' own, in transformers' own order.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import inf
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import (
    EtaLogitsWarper,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    SequenceBiasLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

from fiddler.given import flag, real_number, whole_number

FLOAT32 = torch.finfo(torch.float32)
_TOKEN_IDS = torch.iinfo(torch.int64)


@dataclass(frozen=True, slots=True)
class Kind:
    """How an option's value is read.

    `read` returns a fresh, plain value, or raises `ValueError` with the end of a sentence that begins with the
    option. `off` is the value that does nothing, besides `None`.
    """

    read: Callable[[Any], Any]
    off: Any = None


def _number(low: float, high: float = inf, *, above: bool = False) -> Callable[[Any], float]:
    """Read a number from `low` to `high`, or above `low`."""
    wanted = f"above {low:g}, up to {high:g}" if above else f"from {low:g} to {high:g}"
    if high == inf:
        wanted = f"from {low:g} that fits a float"

    def read(value: Any) -> float:
        number = real_number(value)
        if number is None or not (low < number if above else low <= number) or not number <= high:
            raise ValueError(f"must be a number {wanted}")
        return number

    return read


def _temperature(value: Any) -> float:
    number = _number(0)(value)
    if 0 < number < FLOAT32.tiny:
        raise ValueError(
            f"leaves no token a probability; it must be 0, which is greedy, or {FLOAT32.tiny:.1g} or more"
        )
    return number


def _whole(low: int, high: int | None = None) -> Callable[[Any], int]:
    wanted = f"from {low}" if high is None else f"from {low} to {high}"

    def read(value: Any) -> int:
        number = whole_number(value)
        if number is None or number < low or (high is not None and number > high):
            raise ValueError(f"must be a whole number {wanted}")
        return number

    return read


def _flag(value: Any) -> bool:
    found = flag(value)
    if found is None:
        raise ValueError("must be True or False")
    return found


def _logprobs(value: Any) -> bool:
    found = flag(value)
    if found is None:  # 0 and 1 mean different things in different programs
        raise ValueError("must be True or False: a token comes with its own log-probability, and no others")
    return found


def _listed(value: Any) -> list[Any]:
    """Return several values, or one, as a list; those of an array or tensor are Python's own."""
    several = value.tolist() if hasattr(value, "tolist") else value
    return list(several) if isinstance(several, list | tuple | set | frozenset) else [several]


_one_token = _whole(_TOKEN_IDS.min, _TOKEN_IDS.max)


def _tokens(value: Any) -> tuple[int, ...]:
    try:
        return tuple(_one_token(i) for i in _listed(value))
    except ValueError:
        raise ValueError("must be a token id or several") from None


def _forced(value: Any) -> list[int]:
    ids = list(_tokens(value))
    if not ids or min(ids) < 0:
        raise ValueError("must be a token id or several, from 0")
    return ids


def _words(value: Any) -> list[list[int]]:
    try:
        return [_forced(_several(word)) for word in _several(value)]
    except (TypeError, ValueError):
        raise ValueError("must be a list of lists of token ids, such as [[5], [7, 8]]") from None


def _biases(value: Any) -> dict[tuple[int, ...], float]:
    try:
        pairs = value.items() if isinstance(value, Mapping) else _several(value)
        return {tuple(_forced(_several(ids))): _bias(bias) for ids, bias in pairs}
    except (TypeError, ValueError):
        raise ValueError(
            "must be a list of pairs of token ids and a bias, such as [[[5, 6], -2.0]], or a dictionary"
        ) from None


_bias = _number(-inf)
_factor = _number(float(FLOAT32.min), float(FLOAT32.max))


def _decay(value: Any) -> tuple[int, float]:
    try:
        start, factor = _several(value)
        return _one_token(start), _factor(factor)
    except (TypeError, ValueError):
        raise ValueError("must be two numbers: tokens after which it starts, and its factor") from None


def _several(value: Any) -> list[Any]:
    if not (isinstance(value, list | tuple) or hasattr(value, "tolist")):
        raise TypeError
    return _listed(value)


def _watermark(value: Any) -> Any:
    if not isinstance(value, Mapping | WatermarkingConfig | SynthIDTextWatermarkingConfig):
        raise ValueError("must be a WatermarkingConfig of transformers")
    try:
        config: Any = WatermarkingConfig.from_dict(dict(value)) if isinstance(value, Mapping) else deepcopy(value)
        config.validate()
    except Exception as error:
        raise ValueError(f"must be a WatermarkingConfig of transformers, which refuses it: {error}") from error
    return config


def _stop_strings(value: Any) -> tuple[str, ...]:
    stops = _listed(value)
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError("must be non-empty strings")
    return tuple(str(s) for s in stops)


_share = _number(0, 1)
_penalty = Kind(_number(float(FLOAT32.tiny), float(FLOAT32.max)), off=1.0)
_count = Kind(_whole(0), off=0)

WARPERS: Mapping[str, Kind] = {
    "temperature": Kind(_temperature, off=1.0),
    "top_h": Kind(_number(0, 1, above=True)),
    "top_k": _count,
    "top_p": Kind(_share, off=1.0),
    "min_p": Kind(_share, off=0.0),
    "typical_p": Kind(_number(0, 1, above=True), off=1.0),
    "epsilon_cutoff": Kind(_share, off=0.0),
    "eta_cutoff": Kind(_share, off=0.0),
}
"""Options of the processors that `generate` runs where it samples."""

PROCESSORS: Mapping[str, Kind] = {
    "sequence_bias": Kind(_biases, off={}),
    "encoder_repetition_penalty": _penalty,
    "repetition_penalty": _penalty,
    "no_repeat_ngram_size": _count,
    "encoder_no_repeat_ngram_size": _count,
    "bad_words_ids": Kind(_words, off=[]),
    "min_length": _count,
    "min_new_tokens": _count,
    "forced_bos_token_id": Kind(_forced),
    "forced_eos_token_id": Kind(_forced),
    "remove_invalid_values": Kind(_flag, off=False),
    "exponential_decay_length_penalty": Kind(_decay),
    "suppress_tokens": Kind(_tokens, off=()),
    "begin_suppress_tokens": Kind(_tokens, off=()),
    "watermarking_config": Kind(_watermark),
    "renormalize_logits": Kind(_flag, off=False),
    **WARPERS,
}
"""Options of transformers' logits processors."""

HONOURED: Mapping[str, Kind] = {
    "do_sample": Kind(_flag),
    "seed": Kind(_whole(-(1 << 63), (1 << 64) - 1)),
    "logprobs": Kind(_logprobs),
    "max_new_tokens": Kind(_whole(1)),
    "max_length": Kind(_whole(1)),
    "eos_token_id": Kind(_tokens),
    "stop_strings": Kind(_stop_strings),
    **PROCESSORS,
}
"""Every option the engine honours."""


class _Chooser(GenerationMixin):
    """The parts of a model that transformers' choice of processors reads."""

    def __init__(self, n_vocabulary: int) -> None:
        text = SimpleNamespace(vocab_size=n_vocabulary)
        self.config: Any = SimpleNamespace(is_encoder_decoder=False, get_text_config=lambda: text)


def logits_processors(
    options: Mapping[str, Any],
    prompt_ids: Sequence[int],
    *,
    sample: bool,
    n_most: int,
    eos_token_ids: Sequence[int],
    n_vocabulary: int,
) -> list[LogitsProcessor]:
    """Return what `generate` would run with these options of `GenerationConfig`, after this prompt.

    Each takes ids `[1, T]`, prompt included, and scores `[1, V]`, float32, both on the CPU. `n_most` is the longest
    the sequence may become, in tokens, prompt included. Raises transformers' errors for values that it refuses.
    """
    if not options:
        return []
    config = GenerationConfig()
    for name, value in options.items():
        setattr(config, name, value)
    if options.get("encoder_no_repeat_ngram_size", 0) > len(prompt_ids):
        config.encoder_no_repeat_ngram_size = None  # it bans nothing, and takes time and memory in its size
    config.do_sample = sample
    config.max_length = n_most
    config._eos_token_tensor = _ids(eos_token_ids) if eos_token_ids else None
    chooser: Any = _Chooser(n_vocabulary)
    chosen: list[LogitsProcessor] = chooser._get_logits_processor(
        config, input_ids_seq_length=len(prompt_ids), encoder_input_ids=_ids(prompt_ids)[None], device="cpu"
    )
    for processor in chosen:
        _fix_dtype(processor, options)
    return chosen


def _ids(ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _fix_dtype(processor: LogitsProcessor, options: Mapping[str, Any]) -> None:
    """Make tensors float32 that transformers makes in torch's default dtype, which belongs to the whole process."""
    if isinstance(processor, EtaLogitsWarper):
        processor.epsilon = torch.tensor(options["eta_cutoff"], dtype=torch.float32, device="cpu")
    elif isinstance(processor, SequenceBiasLogitsProcessor):  # its tensor is made later, of these
        processor.sequence_bias = {ids: np.float32(bias) for ids, bias in processor.sequence_bias.items()}
