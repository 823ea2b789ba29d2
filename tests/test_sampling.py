"""Generation options as they are merged and checked, and the token picked from logits as transformers would."""

from itertools import product
from math import inf, nan
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.utils import GenerationMixin

from fiddler.errors import GenerationError
from fiddler.models.sampling import Sampler, SamplingOptions, read_options

EMPTY = GenerationConfig()
VOCABULARY = 40


def options(**overrides: Any) -> SamplingOptions:
    return read_options(EMPTY, None, overrides)


class TestMerging:
    def test_nothing_asked_is_greedy_without_limits(self) -> None:
        assert options() == SamplingOptions()
        assert options().greedy

    def test_models_defaults_hold_where_nothing_else_is_said(self) -> None:
        default = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, eos_token_id=[7, 9])
        found = read_options(default, None, {})
        assert (found.temperature, found.top_k, found.top_p) == (0.6, 20, 0.95)
        assert found.eos_token_ids == {7, 9}

    def test_request_wins_over_the_model_and_overrides_over_both(self) -> None:
        default = GenerationConfig(do_sample=True, temperature=0.1, top_k=1, top_p=0.1, min_p=0.1)
        request = GenerationConfig(temperature=0.2, top_k=2, top_p=0.2)
        found = read_options(default, request, {"temperature": 0.3, "top_k": 3})
        assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0.3, 3, 0.2, 0.1)

    def test_fields_a_request_leaves_open_change_nothing(self) -> None:
        default = GenerationConfig(do_sample=True, temperature=0.5, eos_token_id=3, repetition_penalty=1.2)
        assert read_options(default, GenerationConfig(), {}) == read_options(default, None, {})

    def test_unsupported_options_of_the_model_are_no_reason_to_refuse(self) -> None:
        default = GenerationConfig(num_beams=4, cache_implementation="static", no_repeat_ngram_size=3)
        assert read_options(default, None, {}) == SamplingOptions()

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
        assert options(do_sample=True, top_k=0).top_k is None


class TestGreedyOrSampling:
    @pytest.mark.parametrize(
        "asked", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"seed": 1}], ids=str
    )
    def test_asking_for_a_sampling_option_turns_sampling_on(self, asked: dict[str, Any]) -> None:
        assert not options(**asked).greedy
        assert not read_options(EMPTY, None, asked).greedy

    def test_in_a_request_s_config_too(self) -> None:
        assert not read_options(EMPTY, GenerationConfig(top_p=0.9), {}).greedy

    def test_sampling_options_of_the_model_alone_do_not(self) -> None:
        assert read_options(GenerationConfig(temperature=0.7, top_p=0.9), None, {}).greedy

    @pytest.mark.parametrize("asked", [{"do_sample": False}, {"do_sample": False, "temperature": 0.7, "seed": 1}])
    def test_do_sample_false_is_greedy_whatever_else_is_said(self, asked: dict[str, Any]) -> None:
        assert read_options(GenerationConfig(do_sample=True), None, asked).greedy

    def test_do_sample_true_without_a_temperature_samples_at_one(self) -> None:
        assert options(do_sample=True).temperature == 1.0

    @pytest.mark.parametrize("do_sample", [True, None])
    def test_temperature_zero_is_always_greedy(self, do_sample: bool | None) -> None:
        assert options(do_sample=do_sample, temperature=0).greedy

    def test_other_options_do_not_turn_sampling_on(self) -> None:
        assert options(max_new_tokens=5, repetition_penalty=1.3, logprobs=True, stop_strings="a").greedy


class TestRefused:
    def test_unknown_options_are_named(self) -> None:
        with pytest.raises(GenerationError, match="unknown generation option max_tokens, temprature"):
            options(temprature=1.0, max_tokens=3)

    @pytest.mark.parametrize(
        "asked",
        [
            {"num_beams": 4},
            {"typical_p": 0.5},
            {"no_repeat_ngram_size": 1},
            {"min_new_tokens": 1},
            {"output_scores": True},
            {"forced_eos_token_id": 0},
            {"suppress_tokens": [3]},
            {"guidance_scale": 1.5},
            {"max_time": 1.0},
        ],
        ids=str,
    )
    def test_unsupported_options_are_named_with_the_way_that_takes_them(self, asked: dict[str, Any]) -> None:
        (name,) = asked
        with pytest.raises(GenerationError, match=rf"^{name}=.* is not supported by the engine.*fiddler\.attach"):
            options(**asked)
        with pytest.raises(GenerationError, match=rf"^{name}="):
            read_options(EMPTY, GenerationConfig(**asked), {})

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
            {"use_cache": False},
            {"pad_token_id": 3},
        ],
        ids=str,
    )
    def test_unsupported_options_may_say_that_they_do_nothing(self, asked: dict[str, Any]) -> None:
        assert options(**asked) == SamplingOptions()

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *product(["temperature"], [-0.1, float("nan"), "warm", True, [1.0]]),
            *product(["top_k"], [-1, 2.5, "many", True]),
            *product(["top_p", "min_p"], [-0.1, 1.1, float("nan"), "most"]),
            *product(["repetition_penalty"], [0, -1.0, float("nan"), float("inf"), "some"]),
            *product(["max_new_tokens", "max_length"], [0, -1, 2.5, "few", True]),
            *product(["seed"], [1.5, "lucky", 1 << 64, -(1 << 63) - 1]),
            *product(["stop_strings"], [5, [""], "", ["a", 5], [None]]),
            *product(["eos_token_id"], ["</s>", [1, "2"], 1.5, [[1]]]),
        ],
    )
    def test_impossible_values_name_their_option(self, name: str, value: Any) -> None:
        with pytest.raises(GenerationError, match=f"^{name}="):
            options(**{name: value})


@pytest.mark.parametrize(
    "asked",
    [
        {"top_p": 0.0},
        {"top_p": 1},
        {"min_p": 1},
        {"temperature": 2},
        {"temperature": float("inf")},
        {"repetition_penalty": 2},
        {"seed": -1},
        {"seed": (1 << 64) - 1},
        {"top_k": 10**6},
    ],
    ids=str,
)
def test_every_value_that_is_admitted_can_be_sampled_with(asked: dict[str, Any]) -> None:
    token, _ = Sampler(options(do_sample=True, **asked)).pick(torch.randn(VOCABULARY), [1, 2])
    assert 0 <= token < VOCABULARY


class Recorded(Sampler):
    """A sampler whose final scores can be looked at."""

    def scores(self, logits: Tensor, context: list[int]) -> Tensor:
        seen: list[Tensor] = []
        self._warpers = [*self._warpers, lambda _, scores: seen.append(scores) or scores]
        self.pick(logits, context)
        return seen[0][0]


def expected_scores(logits: Tensor, context: list[int], config: GenerationConfig) -> Tensor:
    """Return what transformers' own chain of processors makes of the logits."""
    oracle: Any = GenerationMixin()
    oracle.config = SimpleNamespace(is_encoder_decoder=False)
    processors = oracle._get_logits_processor(config, len(context), logits_processor=LogitsProcessorList())
    return processors(torch.tensor([context]), logits.float()[None])[0]


COMBINATIONS = [
    {name: value for name, value in zip(("temperature", "top_k", "top_p", "min_p"), values, strict=True) if value}
    for values in product((None, 0.3, 1.7), (None, 1, 7, 1000), (None, 0.5, 1.0), (None, 0.2))
]


class TestSampler:
    @pytest.mark.parametrize("penalty", [None, 1.4, 0.7])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_distributions_are_transformers_own(self, dtype: torch.dtype, penalty: float | None) -> None:
        torch.manual_seed(2)
        for combination in COMBINATIONS:
            logits, context = torch.randn(VOCABULARY).mul(3).to(dtype), [3, 3, 17, 0]
            config = GenerationConfig(do_sample=True, repetition_penalty=penalty, **combination)
            expected = expected_scores(logits, context, config)
            actual = Recorded(read_options(EMPTY, config, {})).scores(logits, context)
            assert torch.equal(actual, expected), combination

    def test_the_combinations_filter_something(self) -> None:
        logits = torch.randn(VOCABULARY)
        config = GenerationConfig(do_sample=True, top_k=7)
        assert expected_scores(logits, [1], config).isinf().sum() == VOCABULARY - 7

    def test_picks_stay_within_what_was_filtered(self) -> None:
        logits = torch.randn(VOCABULARY)
        sampler = Sampler(options(top_k=3, seed=0))
        picked = {sampler.pick(logits, [])[0] for _ in range(200)}
        assert picked == set(logits.topk(3).indices.tolist())

    def test_frequencies_follow_the_probabilities(self) -> None:
        logits = torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1)
        sampler = Sampler(options(do_sample=True, seed=0))
        counts = torch.zeros(3)
        for _ in range(4000):
            counts[sampler.pick(logits, [])[0]] += 1
        torch.testing.assert_close(counts / 4000, logits.exp(), rtol=0, atol=0.03)

    @given(seed=st.integers(0, 1 << 40))
    @settings(max_examples=20, deadline=None)
    def test_a_seed_repeats_its_choices(self, seed: int) -> None:
        logits = torch.zeros(50, VOCABULARY)
        first, second = (Sampler(options(seed=seed)) for _ in range(2))
        assert [first.pick(row, []) for row in logits] == [second.pick(row, []) for row in logits]

    def test_other_seeds_and_none_choose_otherwise(self) -> None:
        def choices(**asked: Any) -> tuple[int, ...]:
            sampler = Sampler(options(do_sample=True, **asked))
            return tuple(sampler.pick(torch.zeros(VOCABULARY), [])[0] for _ in range(50))

        assert len({choices(seed=1), choices(seed=2), choices(), choices()}) == 4

    def test_requests_do_not_disturb_each_others_choices(self) -> None:
        logits = torch.zeros(VOCABULARY)
        alone, beside, other = Sampler(options(seed=1)), Sampler(options(seed=1)), Sampler(options(seed=2))
        expected = [alone.pick(logits, [])[0] for _ in range(20)]
        actual = []
        for _ in range(20):
            other.pick(logits, [])
            torch.rand(3)
            actual.append(beside.pick(logits, [])[0])
        assert actual == expected

    def test_the_logits_are_left_as_they_were(self) -> None:
        logits = torch.randn(VOCABULARY)
        before = logits.clone()
        Sampler(options(temperature=0.5, top_p=0.5, repetition_penalty=2.0)).pick(logits, [1])
        assert torch.equal(logits, before)


class TestDamage:
    ASKED = ({}, {"logprobs": True}, {"repetition_penalty": 1.3}, {"top_k": 2}, {"min_p": 0.5}, {"top_p": 0.5})
    DAMAGED = ([nan, 0, 9, 1], [0, 9, 1, nan], [nan] * 4, [0, inf, 1, 2], [inf, nan, 0, -inf], [-inf] * 4)

    @pytest.mark.parametrize("asked", ASKED, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("damaged", DAMAGED, ids=str)
    def test_logits_that_are_no_numbers_pick_nothing(
        self, damaged: list[float], dtype: torch.dtype, asked: dict[str, Any]
    ) -> None:
        with pytest.raises(FloatingPointError, match=r"logits are not numbers.* weights may be damaged.* dtype="):
            Sampler(options(**asked)).pick(torch.tensor(damaged, dtype=dtype), [2])

    @pytest.mark.parametrize("asked", ASKED, ids=str)
    def test_tokens_that_a_model_rules_out_are_no_damage(self, asked: dict[str, Any]) -> None:
        assert Sampler(options(**asked)).pick(torch.tensor([-inf, 2.0, -inf]), [2])[0] == 1


class TestGreedy:
    @given(st.lists(st.integers(-3, 3), min_size=1, max_size=20))
    @settings(deadline=None)
    def test_takes_the_lowest_id_of_the_likeliest(self, values: list[int]) -> None:
        token, _ = Sampler(options()).pick(torch.tensor(values, dtype=torch.float32), [])
        assert token == values.index(max(values))

    def test_penalty_counts_in_greedy_choices_too(self) -> None:
        logits = torch.tensor([3.0, 2.0])
        assert Sampler(options(repetition_penalty=2.0)).pick(logits, [0])[0] == 1
        assert Sampler(options(repetition_penalty=2.0)).pick(logits, [1])[0] == 0

    def test_ignores_the_models_filters(self) -> None:
        default = GenerationConfig(temperature=0.1, top_k=1)
        logits = torch.tensor([0.0, 1.0, 0.5])
        _, logprob = Sampler(read_options(default, None, {"logprobs": True})).pick(logits, [])
        assert logprob == pytest.approx(float(logits.log_softmax(-1)[1]))


class TestLogprobs:
    def test_are_left_out_unless_asked_for(self) -> None:
        assert Sampler(options()).pick(torch.randn(VOCABULARY), [])[1] is None

    @pytest.mark.parametrize("asked", [{}, {"temperature": 0.4}, {"top_k": 4, "seed": 0}, {"top_p": 0.5}], ids=str)
    def test_are_those_of_the_distribution_drawn_from(self, asked: dict[str, Any]) -> None:
        torch.manual_seed(3)
        logits = torch.randn(VOCABULARY)
        token, logprob = Sampler(options(logprobs=True, **asked)).pick(logits, [1])
        config = GenerationConfig(do_sample=bool(asked), **{k: v for k, v in asked.items() if k != "seed"})
        expected = (
            expected_scores(logits, [1], config).log_softmax(-1)[token] if asked else logits.log_softmax(-1)[token]
        )
        assert logprob == pytest.approx(float(expected))

    def test_of_the_only_possible_token_is_zero(self) -> None:
        assert Sampler(options(top_k=1, logprobs=True)).pick(torch.randn(VOCABULARY), [])[1] == 0.0
