"""Every option that changes logits, beside transformers' own `generate`: asked for, and as a default."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from fiddler import CheckpointError, Engine, EngineConfig, GenerationError, UnsupportedModelError, attach
from fiddler.models.options import PROCESSORS, WARPERS
from tests.support.tiny import save_tiny

pytestmark = pytest.mark.anyio

PROMPTS = ([12], list(range(10, 40)))
GREEDY = EngineConfig(device="cpu", kernels="linear")
N_NEW = 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def anyio_backend() -> str:
    """The caller's loop makes no difference to what is picked behind it."""
    return "trio"


def generated(model: Any, prompt: Sequence[int], **options: Any) -> tuple[int, ...]:
    """Return what transformers makes of a prompt; it warns of much that is no fault here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = model.generate(torch.tensor([prompt]), **options)
    return tuple(ids[0, len(prompt) :].tolist())


def variants(free: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return options that change what a greedy request makes of itself, given what it makes without them."""
    a, b, c, d = free[:4]
    return [
        {"sequence_bias": [[[a], -3.0], [[b, c], -5.0]]},
        {"sequence_bias": {(a,): -3.0, (12, b): 9.0}},
        {"encoder_repetition_penalty": 1.5},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"encoder_no_repeat_ngram_size": 1},
        {"bad_words_ids": [[a], [b, c]], "eos_token_id": b},
        {"min_length": 16, "eos_token_id": [d, a]},
        {"min_new_tokens": 7, "eos_token_id": d},
        {"min_new_tokens": 2, "min_length": 99, "eos_token_id": d},
        {"min_new_tokens": 99, "eos_token_id": d},
        {"forced_bos_token_id": 77},
        {"forced_eos_token_id": 77},
        {"forced_eos_token_id": [77, 78]},
        {"remove_invalid_values": True},
        {"exponential_decay_length_penalty": (2, 1.7), "eos_token_id": 5},
        {"suppress_tokens": [a, b, c]},
        {"begin_suppress_tokens": [a, b]},
        {"begin_suppress_tokens": [a], "forced_bos_token_id": 77},
        {"watermarking_config": {"bias": 6.0}},
        {"watermarking_config": {"bias": 6.0, "seeding_scheme": "selfhash"}},
        {"renormalize_logits": True},
        {"typical_p": 0.2, "top_k": 1, "temperature": 0.3, "do_sample": False},
        {"repetition_penalty": 1.3, "suppress_tokens": [a], "no_repeat_ngram_size": 3, "renormalize_logits": True},
    ]


Case = tuple[list[int], dict[str, Any], tuple[int, ...]]


@pytest.fixture(scope="module")
def cases(tiny: Path) -> list[Case]:
    """Prompts, options, and what transformers makes of them."""
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager").eval()
    found: list[Case] = []
    tried: set[str] = set()
    for prompt in PROMPTS:
        free = generated(model, prompt, max_new_tokens=N_NEW, do_sample=False)
        for options in variants(free):
            made = generated(model, prompt, max_new_tokens=N_NEW, **{"do_sample": False} | options)
            found.append((prompt, options, made))
            tried |= {name for name in options if made != free}
    assert tried >= PROCESSORS.keys() - WARPERS.keys() - {"remove_invalid_values", "renormalize_logits"}
    return found


async def test_asked_for_they_do_what_transformers_does_for_many_at_once(tiny: Path, cases: list[Case]) -> None:
    async with Engine(tiny, GREEDY) as engine:
        streams = [engine.generate_stream(prompt, max_new_tokens=N_NEW, **o) for prompt, o, _ in cases]
        for (_, options, expected), stream in zip(cases, streams, strict=True):
            assert tuple([token.id async for token in stream]) == expected, options


async def test_in_a_request_s_config_they_do_it_too(tiny: Path, cases: list[Case]) -> None:
    async with Engine(tiny, GREEDY) as engine:
        for prompt, options, expected in cases[:: len(cases) // 7]:
            config = GenerationConfig(max_new_tokens=N_NEW, **{"do_sample": False} | options)
            assert (await engine.generate(prompt, config)).token_ids == expected, options


def with_defaults(folder: Path, file: str = "generation_config.json", **options: Any) -> Path:
    """Write a tiny checkpoint with options in one of its files."""
    save_tiny(folder)
    if file == "config.json":
        (folder / "generation_config.json").unlink()
        options = json.loads((folder / file).read_text()) | options
    (folder / file).write_text(json.dumps(options))
    return folder


DEFAULTS: list[dict[str, Any]] = [
    {"suppress_tokens": [80, 238, 12], "no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.7, "sequence_bias": [[[80], -3.0]], "max_new_tokens": 6, "do_sample": False},
    {"eos_token_id": [80, 7], "min_new_tokens": 3, "forced_eos_token_id": 9, "max_length": 35},
]


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("stated", DEFAULTS, ids=lambda stated: ",".join(stated))
async def test_as_a_checkpoint_s_defaults_they_do_it_too(tmp_path: Path, file: str, stated: dict[str, Any]) -> None:
    folder = with_defaults(tmp_path, file, **stated)
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    more = {} if {"max_length", "max_new_tokens"} & stated.keys() else {"max_new_tokens": N_NEW}
    async with Engine(folder, GREEDY) as engine:
        made = (await engine.generate(PROMPTS[1], **more)).token_ids
        off = await engine.generate(PROMPTS[1], **(dict.fromkeys(stated) | {"max_new_tokens": len(made)}))
    assert made == generated(reference, PROMPTS[1], **more)
    assert made != off.token_ids


@pytest.mark.parametrize("max_length", [20, 4096])
async def test_a_length_that_does_not_fit_is_no_reason_to_fail(tmp_path: Path, max_length: int) -> None:
    folder = with_defaults(tmp_path, max_length=max_length, min_length=10**6, do_sample=False)
    async with Engine(folder, EngineConfig(device="cpu", max_context=64)) as engine:
        result = await engine.generate(list(range(10, 40)))
    assert (len(result.token_ids), result.finish_reason) == (34, "length")


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
async def test_what_the_engine_does_not_do_is_refused_at_opening(tmp_path: Path, file: str) -> None:
    folder = with_defaults(tmp_path, file, num_beams=3)
    with pytest.raises(UnsupportedModelError, match=rf"^{file} sets num_beams=3"):
        async with Engine(folder, GREEDY):
            raise AssertionError("it opened")
    model = attach(folder)
    assert generated(model, PROMPTS[0], max_new_tokens=3)


async def test_default_stop_strings_need_a_tokenizer_at_opening(tmp_path: Path) -> None:
    save_tiny(tmp_path, tokenizer=False)
    (tmp_path / "generation_config.json").write_text('{"stop_strings": ["."]}')
    with pytest.raises(UnsupportedModelError, match=r"^generation_config\.json sets stop_strings"):
        async with Engine(tmp_path, GREEDY):
            raise AssertionError("it opened")


async def test_a_damaged_file_of_options_is_refused_at_opening(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read"):
        async with Engine(tmp_path, GREEDY):
            raise AssertionError("it opened")


async def test_options_that_leave_nothing_to_pick_fail_their_request_only(tiny: Path) -> None:
    async with Engine(tiny, GREEDY) as engine:
        good = engine.generate_stream("Hello", max_new_tokens=6)
        with pytest.raises(GenerationError, match="temperature=1e-40"):
            engine.generate_stream("Hello", temperature=1e-40)
        with pytest.raises(GenerationError, match="begin_suppress_tokens"):
            await engine.generate("Hello", begin_suppress_tokens=list(range(1000)))
        assert len([token async for token in good]) == 6
