"""One request's generation options: the checkpoint's, a `GenerationConfig` and keywords, merged and checked."""

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel

from fiddler.errors import CheckpointError, GenerationError, UnsupportedModelError
from fiddler.given import flag, read_json, real_number, shown, whole_number
from fiddler.models.options import HONOURED, PROCESSORS, WARPERS, logits_processors

_FILE = "generation_config.json"
_TURN_SAMPLING_ON = ("temperature", "top_k", "top_p", "min_p", "seed")
_MOST = ("max_new_tokens", "max_length")
_LEAST = ("min_new_tokens", "min_length")
_OF_TOKENS = (
    "sequence_bias",
    "bad_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "watermarking_config",
)
"""Options whose values may not fit the vocabulary, the end tokens or each other."""
_HARMLESS = frozenset({
    "bos_token_id",
    "cache_config",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "low_memory",
    "max_cache_len",
    "pad_token_id",
    "prefill_chunk_size",
    "return_dict_in_generate",
    "transformers_version",
    "use_cache",
})  # fmt: skip
"""Options that change no token."""
_OF_OTHER_MODES = frozenset({
    "assistant_confidence_threshold",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "diversity_penalty",
    "early_stopping",
    "length_penalty",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "speculation_type",
    "target_lookbehind",
})  # fmt: skip
"""Options without effect unless a request asks for beams, an assistant, or more output than tokens."""
_OFF = MappingProxyType(
    {**GenerationConfig._get_default_generation_params(), "guidance_scale": 1.0, "penalty_alpha": 0.0}
)
"""Values, besides `None`, `False` and an empty list, that turn off options which the engine does not honour."""
_ARGUMENTS = frozenset(inspect.signature(GenerationMixin.generate).parameters) - {
    "self",
    "inputs",
    "generation_config",
    "kwargs",
}
"""Arguments of `generate` itself, such as logits processors of the caller's."""
_KNOWN = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """The options of one request, fully resolved.

    At most one of `max_new_tokens` and `max_length` is set; neither means as many tokens as the context holds.
    """

    sample: bool = False
    """Whether tokens are drawn; else the likeliest is always taken."""
    processors: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """The options of transformers' logits processors that do something, by name."""
    seed: int | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False
    asked: frozenset[str] = frozenset()
    """Length options that the request itself set: they are met or refused; the checkpoint's give way to the
    room."""
    n_vocabulary: int = 0
    """Tokens of the vocabulary, 0 where the checkpoint does not say."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """The options a checkpoint brings: its `generation_config.json`, or else those in its `config.json`."""

    options: Mapping[str, Any]
    """Options that the engine honours, read."""
    stated: Mapping[str, Any]
    """All options as they stand there. Names that transformers does not know are ignored."""
    n_vocabulary: int

    @classmethod
    def of_model(cls, model: PreTrainedModel, *, has_tokenizer: bool) -> "Defaults":
        """Read a loaded model's options. Raises `UnsupportedModelError` naming one that cannot be honoured."""
        config = model.generation_config
        file = "config.json" if getattr(config, "_from_model_config", False) else _FILE
        defaults = cls.of(_set_fields(config), vocabulary(model.config), file)
        if defaults.options.get("stop_strings") and not has_tokenizer:
            raise UnsupportedModelError(
                f"{file} sets stop_strings, which need a tokenizer; take them out, or add tokenizer.json"
            )
        return defaults

    @classmethod
    def of(cls, stated: Mapping[str, Any], n_vocabulary: int, file: str = _FILE) -> "Defaults":
        """Read the options that stand in a file. Raises `UnsupportedModelError` naming one we cannot honour."""
        if whole_number(stated.get("top_k")) == -1:  # how other programs write that it is off
            stated = {name: value for name, value in stated.items() if name != "top_k"}
        for name in sorted(_KNOWN & stated.keys() - HONOURED.keys() - _HARMLESS - _OF_OTHER_MODES):
            if not _is_off(name, stated[name]):
                raise UnsupportedModelError(
                    f"{file} sets {name}={shown(stated[name])}, which the engine does not do; take it out of the "
                    "file, or use model = fiddler.attach(path), which takes every option of transformers"
                )
        try:
            options = {name: _read(name, stated[name]) for name in HONOURED if name in stated.keys() & _KNOWN}
            defaults = cls(MappingProxyType(options), MappingProxyType(stated), n_vocabulary)
            read_options(defaults, None, {})
        except GenerationError as error:
            raise UnsupportedModelError(f"{file}: {error}; change it there or take it out") from error
        return defaults


def vocabulary(config: PretrainedConfig) -> int:
    """Return how many tokens a model knows; 0 where its configuration does not say."""
    return int(getattr(config.get_text_config(), "vocab_size", None) or 0)


def check_folder(folder: Path, n_vocabulary: int) -> None:
    """Read a checkpoint's `generation_config.json`, if it has one.

    Raises `CheckpointError` where it cannot be read, which transformers would pass over, and
    `UnsupportedModelError` naming an option that cannot be honoured.
    """
    file = folder / _FILE
    try:
        if not file.exists():
            return
        stated = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(stated, dict):
        raise CheckpointError(f"{file} holds no options; download it again")
    Defaults.of({name: value for name, value in stated.items() if value is not None}, n_vocabulary)


def read_options(
    defaults: Defaults, generation: GenerationConfig | None, overrides: Mapping[str, Any]
) -> SamplingOptions:
    """Merge a checkpoint's defaults, a request's `GenerationConfig` and its keywords, the later ones winning.

    `None` in a `GenerationConfig` leaves an option open; as a keyword it turns the option off. Sampling is on where
    `do_sample` says so, and, if the request leaves `do_sample` unset, where it sets any of temperature, top_k,
    top_p, min_p or seed, or turns on another filter of sampling; temperature 0 is always greedy. A length that the
    request sets replaces the checkpoint's, however that is given. Raises `GenerationError` naming an unknown or
    unsupported option or an impossible value.
    """
    asked = {name: _read(name, value) for name, value in _asked(defaults, generation, overrides).items()}
    merged = {**defaults.options, **asked}
    sample = _samples(asked, merged)
    most, least = (_length(names, asked, defaults.options) for names in (_MOST, _LEAST))
    effective = {**{name: merged.get(name) for name in PROCESSORS.keys() - set(_LEAST)}, **least}
    options = SamplingOptions(
        sample=sample,
        processors=MappingProxyType(
            {
                name: effective[name]
                for name in PROCESSORS
                if effective.get(name) not in (None, PROCESSORS[name].off) and (sample or name not in WARPERS)
            }
        ),
        seed=merged.get("seed"),
        max_new_tokens=most.get("max_new_tokens"),
        max_length=most.get("max_length"),
        eos_token_ids=frozenset(merged.get("eos_token_id") or ()),
        stop_strings=merged.get("stop_strings") or (),
        logprobs=merged.get("logprobs") or False,
        asked=frozenset(name for name in (*_MOST, *_LEAST) if asked.get(name) is not None),
        n_vocabulary=defaults.n_vocabulary,
    )
    _try(options)
    return options


def _asked(
    defaults: Defaults, generation: GenerationConfig | None, overrides: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the request's options that the engine honours. Raises `GenerationError` for any other."""
    if not isinstance(generation, GenerationConfig | None):
        raise GenerationError(
            f"generation={shown(generation)} must be a GenerationConfig of transformers; give single options as "
            "keywords, such as max_new_tokens=64"
        )
    asked = {**_set_fields(generation), **overrides}
    own = {name for name in asked if name not in HONOURED and _same(asked[name], defaults.stated.get(name))}
    unknown = sorted(asked.keys() - own - HONOURED.keys() - _KNOWN - _ARGUMENTS)
    if unknown:
        near = [m for name in unknown for m in difflib.get_close_matches(name, HONOURED, 1)]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise GenerationError(f"unknown generation option {', '.join(unknown)}{hint}")
    for name in sorted(asked.keys() - own - HONOURED.keys() - _HARMLESS):
        if not _is_off(name, asked[name]):
            raise GenerationError(
                f"{name}={shown(asked[name])} is not supported by the engine; "
                "model = fiddler.attach(path); model.generate(...) takes every option of transformers"
            )
    return {name: value for name, value in asked.items() if name in HONOURED}


def _set_fields(config: GenerationConfig | None) -> dict[str, Any]:
    fields = vars(config) if config is not None else {}
    return {name: value for name, value in fields.items() if value is not None and not name.startswith("_")}


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # arrays; objects that raise
        return False


def _is_off(name: str, value: Any) -> bool:
    """Whether an option that the engine does not honour does nothing."""
    if name == "cache_implementation":
        return _same(value, "quantized") is False  # any other holds the same numbers
    if value is None or flag(value) is False or (isinstance(value, list | tuple | set | dict) and not value):
        return True
    off = _OFF.get(name)
    number = real_number(off)
    return _same(value, off) if number is None else real_number(value) == number


def _read(name: str, value: Any) -> Any:
    if value is None:
        return None
    try:
        return HONOURED[name].read(value)
    except Exception as error:  # of an array's or an object's own methods too
        raise GenerationError(f"{name}={shown(value)} {error}") from error


def _samples(asked: Mapping[str, Any], merged: Mapping[str, Any]) -> bool:
    if merged.get("temperature") == 0:
        return False
    if asked.get("do_sample") is not None:
        return bool(asked["do_sample"])
    filters = (name for name in asked.keys() & WARPERS.keys() if asked[name] not in (None, WARPERS[name].off))
    return bool(merged.get("do_sample")) or any(asked.get(n) is not None for n in _TURN_SAMPLING_ON) or any(filters)


def _length(names: tuple[str, str], asked: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, int]:
    """Return the length option that counts: the request's before the checkpoint's, new tokens before all."""
    for given in (asked, {n: v for n, v in defaults.items() if n not in asked}):
        for name in names:
            if given.get(name) is not None:
                return {name: given[name]}
    return {}


def _try(options: SamplingOptions) -> None:
    """Run the processors that have to do with single tokens once. Raises `GenerationError`."""
    tried = {name: options.processors[name] for name in _OF_TOKENS if name in options.processors}
    if not tried or not options.n_vocabulary:
        return
    if "exponential_decay_length_penalty" in tried and not options.eos_token_ids:
        raise GenerationError("exponential_decay_length_penalty needs an end token; set eos_token_id")
    try:
        processors = logits_processors(
            tried,
            [0],
            sample=False,
            n_most=2,
            eos_token_ids=sorted(options.eos_token_ids),
            n_vocabulary=options.n_vocabulary,
        )
        scores = torch.zeros(1, options.n_vocabulary, dtype=torch.float32, device="cpu")
        for processor in processors:
            scores = processor(torch.zeros(1, 1, dtype=torch.int64, device="cpu"), scores)
    except Exception as error:
        raise GenerationError(f"{named(tried)}: {error}") from error
    if not scores.max() > -inf:
        raise GenerationError(f"{named(tried)}: this leaves no token to pick")


def named(options: Mapping[str, Any]) -> str:
    """Return options with their values, for a message."""
    return ", ".join(f"{name}={shown(value)}" for name, value in options.items())
