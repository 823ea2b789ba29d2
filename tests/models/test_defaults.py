"""The generation options a checkpoint brings: honoured, capped or refused at opening, never dropped."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from fiddler.errors import CheckpointError, GenerationError, PromptError, UnsupportedModelError
from fiddler.models import generation as module
from fiddler.models.generation import Defaults, SamplingOptions, check_folder, read_options
from fiddler.models.options import HONOURED
from fiddler.steps.request import token_limit

VOCABULARY = 40


def defaults(**stated: Any) -> Defaults:
    return Defaults.of(stated, VOCABULARY)


def options(**overrides: Any) -> SamplingOptions:
    return read_options(defaults(), None, overrides)


PUBLISHED = [
    {"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.36.0.dev0", "_from_model_config": True},
    {
        "bos_token_id": 151643,
        "do_sample": True,
        "eos_token_id": [3, 4],
        "pad_token_id": 151643,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": "4.51.0",
    },
    {"chat_format": "chatml", "max_window_size": 6144, "max_new_tokens": 512, "do_sample": True, "top_k": 0},
    {"cache_implementation": "hybrid", "pad_token_id": 0, "eos_token_id": [1, 106], "bos_token_id": 2},
    {"cache_implementation": "static", "cache_config": None, "use_cache": True, "max_length": 20},
    {
        "num_beams": 1,
        "num_beam_groups": 1,
        "num_return_sequences": 1,
        "diversity_penalty": 0.0,
        "length_penalty": 1,
    },
    {"do_sample": True, "temperature": 0, "top_k": -1, "top_p": 1, "repetition_penalty": 1},
    {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05},
    {"length_penalty": 2.0, "early_stopping": True, "output_scores": True, "return_dict_in_generate": True},
    {"num_assistant_tokens": 5, "is_assistant": False, "assistant_confidence_threshold": 0.3, "max_time": None},
    {"guidance_scale": None, "suppress_tokens": [], "trust_remote_code": True, "seed": 5, "logprobs": 3, "n": 2},
    {
        "min_length": 0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "encoder_repetition_penalty": 1.0,
    },
    {"stop_strings": ["</s>"], "max_length": 131072, "min_length": 10**6},
]
"""Of the files on the hub, and what older versions of transformers and other programs write into them."""


class TestDefaults:
    @pytest.mark.parametrize("stated", PUBLISHED, ids=str)
    def test_published_files_open_and_leave_requests_free(self, stated: dict[str, Any]) -> None:
        found = defaults(**{k: v for k, v in stated.items() if v is not None})
        assert read_options(found, None, {"do_sample": False, "max_new_tokens": 3}).max_new_tokens == 3
        assert read_options(found, None, {}).seed is None
        assert read_options(found, None, {}).logprobs is False

    @pytest.mark.parametrize("stated", PUBLISHED, ids=str)
    def test_a_request_may_hand_the_checkpoint_s_own_file_back(self, stated: dict[str, Any]) -> None:
        stated = {k: v for k, v in stated.items() if v is not None and k not in ("seed", "logprobs", "top_k")}
        stated["do_sample"] = stated.get("do_sample", False)
        found = defaults(**stated)
        assert (
            read_options(found, GenerationConfig(**stated), {}).processors
            == read_options(found, None, {}).processors
        )

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("num_beams", 4),
            ("num_return_sequences", 2),
            ("guidance_scale", 1.5),
            ("penalty_alpha", 0.6),
            ("dola_layers", "high"),
            ("prompt_lookup_num_tokens", 3),
            ("assistant_early_exit", 4),
            ("constraints", [1]),
            ("force_words_ids", [[1]]),
            ("token_healing", True),
            ("max_time", 5.0),
            ("cache_implementation", "quantized"),
            ("use_mtp", True),
            ("is_assistant", True),
        ],
    )
    def test_what_the_engine_cannot_do_is_refused_by_name(self, name: str, value: Any) -> None:
        with pytest.raises(UnsupportedModelError, match=rf"^generation_config\.json sets {name}=.*fiddler\.attach"):
            defaults(**{name: value})

    @pytest.mark.parametrize(
        ("name", "value"),
        [("top_p", 1.5), ("temperature", "hot"), ("repetition_penalty", 0), ("do_sample", "yes"), ("top_k", -2)],
    )
    def test_an_impossible_default_is_refused_by_name(self, name: str, value: Any) -> None:
        with pytest.raises(UnsupportedModelError, match=rf"^generation_config\.json: {name}=.* change it there"):
            defaults(**{name: value})

    def test_every_option_of_transformers_is_known_to_be_honoured_refused_or_without_effect(self) -> None:
        refused = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
        refused -= HONOURED.keys() | module._HARMLESS | module._OF_OTHER_MODES
        assert refused <= {
            *("assistant_early_exit", "cache_implementation", "constraints", "dola_layers", "force_words_ids"),
            *("guidance_scale", "is_assistant", "max_time", "num_beam_groups", "num_beams", "num_return_sequences"),
            *("penalty_alpha", "prompt_lookup_num_tokens", "token_healing", "use_mtp"),
        }

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\xff"], ids=len)
    def test_a_file_that_holds_no_options_is_refused(self, tmp_path: Path, text: str) -> None:
        check_folder(tmp_path, VOCABULARY)
        (tmp_path / "generation_config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"generation_config\.json"):
            check_folder(tmp_path, VOCABULARY)


class TestLengths:
    @pytest.mark.parametrize(
        ("stated", "asked", "most"),
        [
            ({"max_length": 50}, {}, (None, 50)),
            ({"max_length": 50, "max_new_tokens": 5}, {}, (5, None)),
            ({"max_length": 50}, {"max_new_tokens": 5}, (5, None)),
            ({"max_new_tokens": 5}, {"max_length": 50}, (None, 50)),
            ({"max_new_tokens": 5}, {"max_length": 50, "max_new_tokens": 6}, (6, None)),
            ({"max_new_tokens": 5, "max_length": 50}, {"max_new_tokens": None}, (None, 50)),
        ],
        ids=str,
    )
    def test_the_request_s_before_the_checkpoint_s(
        self, stated: dict[str, int], asked: dict[str, Any], most: tuple[int | None, int | None]
    ) -> None:
        found = read_options(defaults(**stated), None, asked)
        assert (found.max_new_tokens, found.max_length) == most

    @pytest.mark.parametrize(
        ("stated", "asked", "least"),
        [
            ({"min_length": 9}, {}, {"min_length": 9}),
            ({"min_length": 9, "min_new_tokens": 2}, {}, {"min_new_tokens": 2}),
            ({"min_new_tokens": 2}, {"min_length": 9}, {"min_length": 9}),
            ({"min_new_tokens": 2}, {"min_new_tokens": 0}, {}),
        ],
        ids=str,
    )
    def test_the_least_too(self, stated: dict[str, int], asked: dict[str, Any], least: dict[str, int]) -> None:
        assert read_options(defaults(**stated), None, asked).processors == least

    @pytest.mark.parametrize(
        ("stated", "asked", "n_prompt", "limit"),
        [
            ({}, {}, 30, 226),
            ({"max_length": 4096}, {}, 30, 226),
            ({"max_length": 40}, {}, 30, 10),
            ({"max_length": 20}, {}, 30, 226),
            ({"max_length": 30}, {}, 30, 226),
            ({"max_new_tokens": 4096}, {}, 30, 226),
            ({"max_new_tokens": 5}, {}, 30, 5),
            ({"max_new_tokens": 5}, {"min_new_tokens": 9}, 30, 9),
            ({"max_length": 35}, {"min_length": 60}, 30, 30),
            ({"min_new_tokens": 10**6}, {}, 30, 226),
            ({"min_length": 10**6}, {"max_new_tokens": 3}, 30, 3),
            ({}, {"max_new_tokens": 226}, 30, 226),
            ({}, {"max_length": 256}, 30, 226),
            ({}, {"max_new_tokens": 3, "min_new_tokens": 9}, 30, 3),
            ({"max_length": 4096}, {"max_length": 40}, 30, 10),
        ],
        ids=str,
    )
    def test_a_checkpoint_s_length_gives_way(
        self, stated: dict[str, int], asked: dict[str, Any], n_prompt: int, limit: int
    ) -> None:
        assert token_limit(n_prompt, read_options(defaults(**stated), None, asked), 256) == limit

    @pytest.mark.parametrize(
        ("asked", "error", "said"),
        [
            ({"max_new_tokens": 227}, PromptError, "set max_new_tokens to at most 226"),
            ({"max_new_tokens": 10**5000}, PromptError, "set max_new_tokens to at most 226"),
            ({"max_length": 257}, PromptError, "max_length=257 exceeds .* set max_length to at most 256"),
            ({"max_length": 30}, PromptError, "max_length=30; shorten it, or set max_length higher"),
            ({"min_new_tokens": 227}, GenerationError, "min_new_tokens=227 exceeds .* at most 226"),
            ({"min_length": 257}, GenerationError, "min_length=257 exceeds .* at most 256"),
        ],
        ids=lambda value: str(value)[:40] if not isinstance(value, dict) else next(iter(value)),
    )
    def test_a_request_s_length_is_met_or_refused(
        self, asked: dict[str, int], error: type[Exception], said: str
    ) -> None:
        with pytest.raises(error, match=said):
            token_limit(30, options(**asked), 256)
