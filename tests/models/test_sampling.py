"""The token picked from logits, as transformers would pick it, whatever the process does meanwhile."""

import threading
from collections.abc import Sequence
from itertools import product
from math import inf, nan
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.utils import GenerationMixin

from fiddler.errors import GenerationError
from fiddler.models.generation import Defaults, read_options
from fiddler.models.options import PROCESSORS
from fiddler.models.sampling import Sampler
from tests.support.covering import covering
from tests.support.default_dtype import default_dtype

VOCABULARY = 40
NONE = Defaults.of({}, VOCABULARY)


def sampler(prompt_ids: Sequence[int] = (0,), **overrides: Any) -> Sampler:
    return Sampler(read_options(NONE, None, overrides), prompt_ids, 100)


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
    token, _ = sampler([1, 2], do_sample=True, **asked).pick(torch.randn(VOCABULARY), [1, 2])
    assert 0 <= token < VOCABULARY


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
            picking = Sampler(read_options(NONE, config, {}), context, 100)
            assert torch.equal(picking._processed(logits.float(), context), expected), combination

    def test_the_combinations_filter_something(self) -> None:
        logits = torch.randn(VOCABULARY)
        config = GenerationConfig(do_sample=True, top_k=7)
        assert expected_scores(logits, [1], config).isinf().sum() == VOCABULARY - 7

    def test_picks_stay_within_what_was_filtered(self) -> None:
        logits = torch.randn(VOCABULARY)
        picking = sampler(top_k=3, seed=0)
        picked = {picking.pick(logits, [])[0] for _ in range(200)}
        assert picked == set(logits.topk(3).indices.tolist())

    def test_frequencies_follow_the_probabilities(self) -> None:
        logits = torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1)
        picking = sampler(do_sample=True, seed=0)
        counts = torch.zeros(3)
        for _ in range(4000):
            counts[picking.pick(logits, [])[0]] += 1
        torch.testing.assert_close(counts / 4000, logits.exp(), rtol=0, atol=0.03)

    @given(seed=st.integers(0, 1 << 40))
    @settings(max_examples=20, deadline=None)
    def test_a_seed_repeats_its_choices(self, seed: int) -> None:
        logits = torch.zeros(50, VOCABULARY)
        first, second = (sampler(seed=seed) for _ in range(2))
        assert [first.pick(row, []) for row in logits] == [second.pick(row, []) for row in logits]

    def test_other_seeds_and_none_choose_otherwise(self) -> None:
        def choices(**asked: Any) -> tuple[int, ...]:
            picking = sampler(do_sample=True, **asked)
            return tuple(picking.pick(torch.zeros(VOCABULARY), [])[0] for _ in range(50))

        assert len({choices(seed=1), choices(seed=2), choices(), choices()}) == 4

    def test_requests_do_not_disturb_each_others_choices(self) -> None:
        logits = torch.zeros(VOCABULARY)
        alone, beside, other = sampler(seed=1), sampler(seed=1), sampler(seed=2)
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
        sampler(temperature=0.5, top_p=0.5, repetition_penalty=2.0).pick(logits, [1])
        assert torch.equal(logits, before)


class TestDamage:
    ASKED = ({}, {"logprobs": True}, {"repetition_penalty": 1.3}, {"top_k": 2}, {"min_p": 0.5}, {"top_p": 0.5})
    DAMAGED = ([nan, 0, 9, 1], [0, 9, 1, nan], [nan] * 4, [0, inf, 1, 2], [inf, nan, 0, -inf], [-inf] * 4)

    @pytest.mark.parametrize(
        ("damaged", "dtype", "asked"),
        covering(DAMAGED, [torch.float32, torch.bfloat16, torch.float16], ASKED),
        ids=str,
    )
    def test_logits_that_are_no_numbers_pick_nothing(
        self, damaged: list[float], dtype: torch.dtype, asked: dict[str, Any]
    ) -> None:
        with pytest.raises(FloatingPointError, match=r"logits are not numbers.* weights may be damaged.* dtype="):
            sampler(**asked).pick(torch.tensor(damaged, dtype=dtype), [2])

    @pytest.mark.parametrize("asked", ASKED, ids=str)
    def test_tokens_that_a_model_rules_out_are_no_damage(self, asked: dict[str, Any]) -> None:
        assert sampler(**asked).pick(torch.tensor([-inf, 2.0, -inf]), [2])[0] == 1


class TestGreedy:
    @given(st.lists(st.integers(-3, 3), min_size=1, max_size=20))
    @settings(deadline=None)
    def test_takes_the_lowest_id_of_the_likeliest(self, values: list[int]) -> None:
        token, _ = sampler().pick(torch.tensor(values, dtype=torch.float32), [])
        assert token == values.index(max(values))

    def test_penalty_counts_in_greedy_choices_too(self) -> None:
        logits = torch.tensor([3.0, 2.0])
        assert sampler(repetition_penalty=2.0).pick(logits, [0])[0] == 1
        assert sampler(repetition_penalty=2.0).pick(logits, [1])[0] == 0

    def test_ignores_the_models_filters(self) -> None:
        default = Defaults.of({"temperature": 0.1, "top_k": 1}, VOCABULARY)
        logits = torch.tensor([0.0, 1.0, 0.5])
        _, logprob = Sampler(read_options(default, None, {"logprobs": True}), [0], 100).pick(logits, [0])
        assert logprob == pytest.approx(float(logits.log_softmax(-1)[1]))


class TestLogprobs:
    def test_are_left_out_unless_asked_for(self) -> None:
        assert sampler().pick(torch.randn(VOCABULARY), [])[1] is None

    @pytest.mark.parametrize("asked", [{}, {"temperature": 0.4}, {"top_k": 4, "seed": 0}, {"top_p": 0.5}], ids=str)
    def test_are_those_of_the_distribution_drawn_from(self, asked: dict[str, Any]) -> None:
        torch.manual_seed(3)
        logits = torch.randn(VOCABULARY)
        token, logprob = sampler(logprobs=True, **asked).pick(logits, [1])
        config = GenerationConfig(do_sample=bool(asked), **{k: v for k, v in asked.items() if k != "seed"})
        expected = (
            expected_scores(logits, [1], config).log_softmax(-1)[token] if asked else logits.log_softmax(-1)[token]
        )
        assert logprob == pytest.approx(float(expected))

    def test_of_the_only_possible_token_is_zero(self) -> None:
        assert sampler(top_k=1, logprobs=True).pick(torch.randn(VOCABULARY), [])[1] == 0.0


EVERY: list[dict[str, Any]] = [
    {"sequence_bias": [[[3], 0.3], [[4, 5], -0.7], [[0, 6], 0.1]]},
    {"encoder_repetition_penalty": 1.3},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 2},
    {"bad_words_ids": [[3], [0, 7]]},
    {"min_length": 9},
    {"min_new_tokens": 9},
    {"forced_bos_token_id": 4},
    {"forced_eos_token_id": 4},
    {"remove_invalid_values": True},
    {"exponential_decay_length_penalty": (0, 1.3)},
    {"suppress_tokens": [3, 4]},
    {"begin_suppress_tokens": [3, 4]},
    {"watermarking_config": {"bias": 0.7}},
    {"renormalize_logits": True},
    {"temperature": 0.7},
    {"top_h": 0.4},
    {"top_k": 7},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"typical_p": 0.7},
    {"epsilon_cutoff": 0.01},
    {"eta_cutoff": 0.011},
]


def trace(asked: dict[str, Any], n: int = 12) -> list[tuple[int, float | None]]:
    """Return what one request draws from some logits."""
    context = [0]
    rows = np.random.default_rng(5).normal(size=(n, VOCABULARY)).astype(np.float32)
    picking = sampler(context, do_sample=True, seed=3, logprobs=True, eos_token_id=[8, 9], **asked)
    picked = []
    for row in rows:
        picked.append(picking.pick(torch.from_numpy(row), context))
        context.append(picked[-1][0])
    return picked


def test_more_tokens_than_a_prompt_has_are_no_ngram_of_it() -> None:
    """transformers would take time and memory in that number."""
    assert not sampler([1, 2, 3], encoder_no_repeat_ngram_size=4)._processors
    assert sampler([1, 2, 3], encoder_no_repeat_ngram_size=3)._processors
    assert sampler([1, 2, 3], encoder_no_repeat_ngram_size=10**12).pick(torch.zeros(VOCABULARY), [1, 2, 3])[0] == 0


class TestTheProcessAround:
    """The process's own settings, and whoever changes them meanwhile, change no token and no probability."""

    def test_every_processor_is_tried(self) -> None:
        assert sorted(name for asked in EVERY for name in asked) == sorted(PROCESSORS)

    @pytest.mark.parametrize(
        ("dtype", "asked"),
        [
            *product([torch.bfloat16], [{}, *EVERY]),  # the coarsest, in which most is lost
            *product([torch.float16, torch.float64], [{}, {"temperature": 0.7}]),
        ],
        ids=str,
    )
    def test_the_default_dtype(self, asked: dict[str, Any], dtype: torch.dtype) -> None:
        expected = trace(asked)
        with default_dtype(dtype):
            assert trace(asked) == expected

    @pytest.mark.parametrize("asked", [{}, *EVERY], ids=str)
    def test_the_default_device(self, asked: dict[str, Any]) -> None:
        expected = trace(asked)
        with torch.device("meta"):
            assert trace(asked) == expected

    def test_the_generator_of_the_process(self) -> None:
        torch.manual_seed(1)
        expected, after = trace({}), torch.rand(1)
        torch.manual_seed(1)
        torch.rand(7)
        assert trace({}) == expected
        torch.manual_seed(1)
        trace({})
        assert torch.rand(1) == after

    def test_a_thread_that_changes_the_default_dtype_all_the_time(self) -> None:
        expected, ending = trace({"temperature": 1.1}), threading.Event()

        def change() -> None:
            while not ending.is_set():
                for dtype in (torch.bfloat16, torch.float64, torch.float32):
                    torch.set_default_dtype(dtype)

        before = torch.get_default_dtype()
        changing = threading.Thread(target=change)
        changing.start()
        try:
            assert all(trace({"temperature": 1.1}) == expected for _ in range(40))
        finally:
            ending.set()
            changing.join()
            torch.set_default_dtype(before)

    @pytest.mark.parametrize("asked", [{}, {"top_p": 0.9}, {"min_p": 0.01}, {"top_k": 900}], ids=str)
    def test_the_number_of_threads(self, asked: dict[str, Any]) -> None:
        logits = torch.from_numpy(np.random.default_rng(6).normal(size=150_000).astype(np.float32))

        def picked() -> list[tuple[int, float | None]]:
            picking = sampler(do_sample=True, seed=3, logprobs=True, **asked)
            return [picking.pick(logits, [0]) for _ in range(3)]

        before = torch.get_num_threads()
        try:
            found = [torch.set_num_threads(n) or picked() for n in (1, 2, 5)]
        finally:
            torch.set_num_threads(before)
        assert found[0] == found[1] == found[2]

    def test_numbers_are_drawn_in_float32(self) -> None:
        """512 draws from 16,384 equally likely tokens hardly meet; of bfloat16 there would be 256 numbers."""
        picking = sampler(do_sample=True, seed=0)
        with default_dtype(torch.bfloat16):
            assert len({picking.pick(torch.zeros(1 << 14), [])[0] for _ in range(512)}) > 450


class TestNothingToPick:
    @pytest.mark.parametrize("sample", [False, True])
    @pytest.mark.parametrize(
        "asked",
        [
            {"suppress_tokens": list(range(1, VOCABULARY)), "bad_words_ids": [[0]]},
            {"suppress_tokens": list(range(1, VOCABULARY)), "min_new_tokens": 3, "eos_token_id": 0},
            {"begin_suppress_tokens": list(range(VOCABULARY))},
            {"sequence_bias": [[[i], -float("inf")] for i in range(VOCABULARY)], "remove_invalid_values": False},
            {"exponential_decay_length_penalty": (-(10**6), 1.5), "eos_token_id": 3},
        ],
        ids=lambda asked: ",".join(asked),
    )
    def test_options_are_named(self, asked: dict[str, Any], sample: bool) -> None:
        with pytest.raises(GenerationError, match=f"{next(iter(asked))}="):
            sampler([0], do_sample=sample, **asked).pick(torch.randn(VOCABULARY), [0])

    def test_a_temperature_that_these_logits_do_not_bear_is_named(self) -> None:
        with pytest.raises(GenerationError, match="temperature=2e-38"):
            sampler(temperature=2e-38).pick(torch.randn(VOCABULARY) * 50, [0])

    @pytest.mark.parametrize(
        "asked", [{}, {"temperature": 0.5}, {"repetition_penalty": 1.2}, {"top_k": 3}], ids=str
    )
    @pytest.mark.parametrize("logit", [float("nan"), float("inf"), -float("inf")])
    def test_the_model_s_own_fault_is_not_called_the_options(self, asked: dict[str, Any], logit: float) -> None:
        with pytest.raises(FloatingPointError, match="model's logits"):
            sampler(**asked).pick(torch.full((VOCABULARY,), logit), [0])

    def test_one_logit_that_is_no_number_is_a_fault(self) -> None:
        logits = torch.zeros(VOCABULARY)
        logits[7] = float("nan")
        for asked in ({}, {"temperature": 0.5}):
            with pytest.raises(FloatingPointError, match="model's logits"):
                sampler(**asked).pick(logits, [0])
        assert sampler(remove_invalid_values=True).pick(logits, [0])[0] == 0
