"""Generation options as a request gives them: merged with the checkpoint's, and checked at once."""

from decimal import Decimal
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig

from fiddler.errors import GenerationError
from fiddler.models.generation import Defaults, SamplingOptions, read_options
from fiddler.models.options import HONOURED
from tests.support.covering import spread

VOCABULARY = 40


def defaults(**stated: Any) -> Defaults:
    return Defaults.of(stated, VOCABULARY)


NONE = defaults()


def read_alike() -> list[list[str]]:
    """Return the options' names by the reader of their values, whatever its bounds."""
    found: dict[str, list[str]] = {}
    for name in sorted(HONOURED):
        found.setdefault(HONOURED[name].read.__qualname__, []).append(name)
    return list(found.values())


def kind(value: Any) -> str:
    """A value in the name of a case: as it is in a text, and its type otherwise."""
    return value if isinstance(value, str) and value else str(type(value))


def options(**overrides: Any) -> SamplingOptions:
    return read_options(NONE, None, overrides)


class TestMerging:
    def test_nothing_asked_is_greedy_without_limits(self) -> None:
        assert options() == SamplingOptions(n_vocabulary=VOCABULARY)

    def test_models_defaults_hold_where_nothing_else_is_said(self) -> None:
        default = defaults(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, eos_token_id=[7, 9])
        found = read_options(default, None, {})
        assert found.processors == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
        assert found.eos_token_ids == {7, 9}

    def test_request_wins_over_the_model_and_overrides_over_both(self) -> None:
        default = defaults(do_sample=True, temperature=0.1, top_k=1, top_p=0.1, min_p=0.1)
        request = GenerationConfig(temperature=0.2, top_k=2, top_p=0.2)
        found = read_options(default, request, {"temperature": 0.3, "top_k": 3})
        assert found.processors == {"temperature": 0.3, "top_k": 3, "top_p": 0.2, "min_p": 0.1}

    def test_fields_a_request_leaves_open_change_nothing(self) -> None:
        default = defaults(do_sample=True, temperature=0.5, eos_token_id=3, repetition_penalty=1.2)
        assert read_options(default, GenerationConfig(), {}) == read_options(default, None, {})

    def test_a_keyword_that_is_none_turns_an_option_of_the_model_off(self) -> None:
        default = defaults(repetition_penalty=1.2, suppress_tokens=[3], eos_token_id=3, max_length=9)
        off = {"repetition_penalty": None, "suppress_tokens": None, "eos_token_id": None, "max_length": None}
        assert read_options(default, None, off) == options()

    @pytest.mark.parametrize(
        ("eos", "expected"), [(5, {5}), (0, {0}), ([5, 6], {5, 6}), ([], set()), (None, set())]
    )
    def test_one_end_token_or_several(self, eos: Any, expected: set[int]) -> None:
        assert options(eos_token_id=eos).eos_token_ids == expected

    @pytest.mark.parametrize(
        ("stop", "expected"), [("a", ("a",)), (["a", "bc"], ("a", "bc")), ([], ()), (None, ())]
    )
    def test_one_stop_string_or_several(self, stop: Any, expected: tuple[str, ...]) -> None:
        assert options(stop_strings=stop).stop_strings == expected

    def test_options_most_used_as_overrides(self) -> None:
        found = options(max_new_tokens=5, seed=11, logprobs=True)
        assert (found.max_new_tokens, found.seed, found.logprobs) == (5, 11, True)

    def test_top_k_zero_is_off(self) -> None:
        assert options(do_sample=True, top_k=0).processors == {}


class TestGreedyOrSampling:
    @pytest.mark.parametrize(
        "asked",
        [
            *({"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"seed": 1}, {"temperature": 1}),
            *({"typical_p": 0.5}, {"top_h": 0.5}, {"epsilon_cutoff": 0.1}, {"eta_cutoff": 0.1}),
        ],
        ids=str,
    )
    def test_asking_for_a_sampling_option_turns_sampling_on(self, asked: dict[str, Any]) -> None:
        assert options(**asked).sample

    def test_in_a_request_s_config_too(self) -> None:
        assert read_options(NONE, GenerationConfig(top_p=0.9), {}).sample

    def test_sampling_options_of_the_model_alone_do_not(self) -> None:
        assert read_options(defaults(temperature=0.7, top_p=0.9), None, {}) == options()

    @pytest.mark.parametrize("asked", [{"do_sample": False}, {"do_sample": False, "temperature": 0.7, "seed": 1}])
    def test_do_sample_false_is_greedy_whatever_else_is_said(self, asked: dict[str, Any]) -> None:
        assert read_options(defaults(do_sample=True, top_p=0.5), None, asked).processors == {}
        assert not read_options(defaults(do_sample=True), None, asked).sample

    def test_do_sample_true_without_a_temperature_samples_at_one(self) -> None:
        assert options(do_sample=True).sample
        assert options(do_sample=True).processors == options(temperature=1.0).processors == {}

    @pytest.mark.parametrize("do_sample", [True, None])
    @pytest.mark.parametrize("temperature", [0, 0.0, -0.0, np.float32(0)], ids=repr)
    def test_temperature_zero_is_always_greedy(self, do_sample: bool | None, temperature: Any) -> None:
        assert options(do_sample=do_sample, temperature=temperature) == options()

    def test_other_options_do_not_turn_sampling_on(self) -> None:
        assert options(max_new_tokens=5, repetition_penalty=1.3, logprobs=True, stop_strings="a").sample is False


class TestRefused:
    def test_unknown_options_are_named(self) -> None:
        with pytest.raises(GenerationError, match="unknown generation option max_tokens, temprature"):
            options(temprature=1.0, max_tokens=3)

    @pytest.mark.parametrize(
        "asked",
        [
            {"num_beams": 4},
            {"output_scores": True},
            {"guidance_scale": 1.5},
            {"penalty_alpha": 0.6},
            {"dola_layers": "low"},
            {"prompt_lookup_num_tokens": 3},
            {"assistant_early_exit": 2},
            {"length_penalty": 2.0},
            {"cache_implementation": "quantized"},
            {"max_time": 1.0},
            {"max_time": 0},
        ],
        ids=str,
    )
    def test_unsupported_options_are_named_with_the_way_that_takes_them(self, asked: dict[str, Any]) -> None:
        (name,) = asked
        with pytest.raises(GenerationError, match=rf"^{name}=.* is not supported by the engine.*fiddler\.attach"):
            options(**asked)
        with pytest.raises(GenerationError, match=rf"^{name}="):
            read_options(NONE, GenerationConfig(**asked), {})

    @pytest.mark.parametrize("name", ["logits_processor", "stopping_criteria", "assistant_model", "streamer"])
    def test_arguments_of_generate_too(self, name: str) -> None:
        with pytest.raises(GenerationError, match=rf"^{name}=.* is not supported by the engine"):
            options(**{name: [1]})

    @pytest.mark.parametrize(
        "asked",
        [
            {"num_beams": 1},
            {"typical_p": 1.0},
            {"length_penalty": 1.0},
            {"no_repeat_ngram_size": 0},
            {"min_new_tokens": None},
            {"output_scores": False},
            {"suppress_tokens": []},
            {"sequence_bias": {}},
            {"encoder_repetition_penalty": 1},
            {"eta_cutoff": 0.0},
            {"num_return_sequences": 1},
            {"guidance_scale": 1.0},
            {"cache_implementation": "static"},
            {"num_assistant_tokens": 20},
            {"use_cache": False},
            {"pad_token_id": 3},
        ],
        ids=str,
    )
    def test_unsupported_options_may_say_that_they_do_nothing(self, asked: dict[str, Any]) -> None:
        assert options(**asked) == options()

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *product(["temperature"], [-0.1, float("nan"), "warm", True, [1.0]]),
            *product(["top_k"], [-1, 2.5, "many", True]),
            *product(["top_p", "min_p"], [-0.1, 1.1, float("nan"), "most"]),
            *product(["repetition_penalty"], [0, -1.0, float("nan"), float("inf"), "some"]),
            *product(["max_new_tokens", "max_length"], [0, -1, 2.5, "few", True]),
            *product(["seed"], [1.5, "lucky", 1 << 64, -(1 << 63) - 1]),
            *product(["typical_p", "top_h"], [0, 1.1, -0.1, "most"]),
            *product(["no_repeat_ngram_size", "min_length", "min_new_tokens"], [-1, 1.5, True, "2"]),
            *product(["suppress_tokens", "begin_suppress_tokens"], ["a", [1.5], [[1]], [True]]),
            *product(["stop_strings"], [5, [""], "", ["a", 5], [None]]),
            *product(["eos_token_id"], ["</s>", [1, "2"], 1.5, [[1]]]),
        ],
    )
    def test_impossible_values_name_their_option(self, name: str, value: Any) -> None:
        with pytest.raises(GenerationError, match=f"^{name}="):
            options(**{name: value})


class Odd:
    """An object of a caller's whose methods raise."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be compared")

    def __repr__(self) -> str:
        raise RuntimeError("not to be shown")


BEYOND = {"400": 10**400, "5000": -(10**5000), "nan": float("nan"), "inf": -float("inf")}
"""Numbers, by the case's name."""


class TestValues:
    @pytest.mark.parametrize(
        "value",
        [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), Decimal("0.5"), Fraction(1, 2)],
        ids=repr,
    )
    def test_numbers_of_every_make(self, value: Any) -> None:
        assert options(temperature=value).processors == {"temperature": 0.5}

    @pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array([3]), torch.tensor(3)], ids=repr)
    def test_whole_numbers_of_every_make(self, value: Any) -> None:
        found = options(
            max_new_tokens=value, top_k=value, no_repeat_ngram_size=value, seed=value, eos_token_id=value
        )
        assert found.processors == {"top_k": 3, "no_repeat_ngram_size": 3}
        assert (found.max_new_tokens, found.seed, found.eos_token_ids) == (3, 3, {3})
        assert type(found.processors["top_k"]) is type(found.max_new_tokens) is type(found.seed) is int

    @pytest.mark.parametrize("value", [(1, 2), {1, 2}, np.array([1, 2]), torch.tensor([1, 2])], ids=repr)
    def test_several_ids_of_every_make(self, value: Any) -> None:
        found = options(eos_token_id=value, suppress_tokens=value, bad_words_ids=[list(value)])
        assert found.eos_token_ids == {1, 2}
        assert found.processors == {"suppress_tokens": (1, 2), "bad_words_ids": [[1, 2]]}

    @pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True)], ids=repr)
    def test_flags_of_every_make(self, value: Any) -> None:
        assert options(do_sample=value, logprobs=value).logprobs is options(do_sample=value).sample is True

    @pytest.mark.parametrize(
        ("name", "value"),
        spread(
            [["do_sample", "renormalize_logits", "remove_invalid_values"], ["logprobs"]],
            ["no", "", 0, 1, 1.0, [], [True], np.array([True, False]), Odd()],
        ),
        ids=kind,
    )
    def test_flags_are_nothing_but_true_or_false(self, name: str, value: Any) -> None:
        with pytest.raises(GenerationError, match=f"^{name}=.* must be True or False"):
            options(**{name: value})

    @pytest.mark.parametrize("value", [0, 1, 2, 5])
    def test_logprobs_are_of_the_token_alone_whatever_number_of_others_is_asked_for(self, value: int) -> None:
        with pytest.raises(GenerationError, match=f"^logprobs={value} .* its own log-probability, and no others"):
            options(logprobs=value)

    @pytest.mark.parametrize(
        ("name", "value"),
        spread(
            [["num_return_sequences", "num_beams", "guidance_scale", "length_penalty"]],
            [True, np.True_, 2, "1", np.array([1, 1]), torch.ones(2), Odd()],
        ),
        ids=kind,
    )
    def test_only_a_number_says_that_an_unsupported_number_does_nothing(self, name: str, value: Any) -> None:
        with pytest.raises(GenerationError, match=f"^{name}=.* is not supported"):
            options(**{name: value})
        assert options(**{name: 1}) == options(**{name: np.int64(1)}) == options(**{name: 1.0}) == options()

    @pytest.mark.parametrize(
        ("name", "value"),
        spread(
            read_alike(),
            [Odd(), object(), 1j, b"1", {"a": Odd()}, [Odd()], np.zeros((2, 2)), torch.rand(2, 2)],
        ),
        ids=kind,
    )
    def test_nothing_that_is_no_value_raises_anything_else(self, name: str, value: Any) -> None:
        with pytest.raises(GenerationError, match=f"^{name}="):
            options(**{name: value})

    @pytest.mark.parametrize(
        ("name", "which"),
        [*product(sorted(HONOURED), ["400"]), *spread(read_alike(), ["5000", "nan", "inf"])],
    )
    def test_numbers_beyond_all_bounds(self, name: str, which: str) -> None:
        value = BEYOND[which]
        whole = {"top_k", "max_new_tokens", "max_length", "min_length", "min_new_tokens"}
        if value == 10**400 and name in whole | {"no_repeat_ngram_size", "encoder_no_repeat_ngram_size"}:
            assert options(**{name: value}) != options()
            return
        with pytest.raises(GenerationError, match=f"^{name}="):
            options(**{name: value})

    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ({"temperature": 1e-40}, "^temperature=1e-40 leaves no token a probability"),
            ({"temperature": 1e-300}, "^temperature=1e-300 leaves no token"),
            ({"temperature": 10**400}, r"^temperature=1000.*\.\.\. must be a number"),
            ({"repetition_penalty": 1e-300}, "^repetition_penalty=1e-300 must be"),
            ({"repetition_penalty": 1e300}, "^repetition_penalty=1e.300 must be"),
            ({"encoder_repetition_penalty": 0}, "^encoder_repetition_penalty=0 must be"),
            ({"suppress_tokens": range(0)}, "^suppress_tokens="),
            ({"suppress_tokens": list(range(VOCABULARY))}, "^suppress_tokens=.*no token to pick"),
            ({"forced_eos_token_id": 5, "suppress_tokens": [4, 5]}, "forced_eos_token_id=.*suppress_tokens="),
            ({"forced_bos_token_id": VOCABULARY}, "^forced_bos_token_id="),
            ({"bad_words_ids": [[VOCABULARY]]}, "^bad_words_ids="),
            ({"bad_words_ids": [3]}, "^bad_words_ids="),
            ({"bad_words_ids": [[]]}, "^bad_words_ids="),
            ({"sequence_bias": {3: 1.0}}, "^sequence_bias="),
            ({"sequence_bias": [[[3], float("nan")]]}, "^sequence_bias="),
            ({"exponential_decay_length_penalty": (1,), "eos_token_id": 3}, "^exponential_decay_length_penalty="),
            ({"exponential_decay_length_penalty": (1, 1.5)}, "^exponential_decay_length_penalty .*eos_token_id"),
            ({"watermarking_config": {"nonsense": 1}}, "^watermarking_config=.* must be .* refuses it: .*nonsense"),
            ({"watermarking_config": {"greenlist_ratio": "a"}}, "^watermarking_config=.* must be .* refuses it"),
            ({"watermarking_config": WatermarkingConfig(greenlist_ratio=1.0)}, "^watermarking_config="),
        ],
        ids=str,
    )
    def test_options_that_cannot_work_are_refused_at_once(self, asked: dict[str, Any], said: str) -> None:
        with pytest.raises(GenerationError, match=said):
            options(**asked)

    def test_what_a_caller_changes_afterwards_changes_nothing(self) -> None:
        words, stops, watermark = [[1, 2]], ["a"], WatermarkingConfig(bias=3.0)
        found = options(bad_words_ids=words, stop_strings=stops, watermarking_config=watermark)
        words[0].append(3)
        stops.append("b")
        watermark.bias = 5.0
        assert found.processors == {"bad_words_ids": [[1, 2]], "watermarking_config": WatermarkingConfig(bias=3.0)}
        assert found.stop_strings == ("a",)

    @pytest.mark.parametrize(
        "config", [{"bias": 3.0}, SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2])], ids=type
    )
    def test_watermarks_of_both_kinds(self, config: Any) -> None:
        assert "watermarking_config" in options(watermarking_config=config).processors

    @pytest.mark.parametrize(
        "generation", [{"max_new_tokens": 5}, "greedy", 5, [], Odd(), GenerationConfig], ids=type
    )
    def test_a_request_s_config_is_a_generation_config(self, generation: Any) -> None:
        with pytest.raises(GenerationError, match=r"^generation=.* must be a GenerationConfig .* as keywords"):
            read_options(NONE, generation, {})

    def test_unknown_names_are_refused_in_a_config_too_and_the_likely_one_is_named(self) -> None:
        said = "unknown generation option temprature; did you mean temperature"
        with pytest.raises(GenerationError, match=said):
            options(temprature=1.0)
        with pytest.raises(GenerationError, match=said):
            read_options(NONE, GenerationConfig(temprature=1.0), {})
