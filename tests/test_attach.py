"""Fiddler's experts under plain transformers: every way of generating says what it says with transformers' own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

import fiddler
from fiddler import CheckpointError, UnsupportedModelError
from tests.architectures import build

Save = Callable[[PreTrainedModel], Path]

PROMPT = torch.tensor([[5, 9, 5, 9, 33, 5, 9, 5, 9, 33, 5, 9]])

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam search": {"num_beams": 4},
    "beam search, all beams": {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[7]]},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
}


def generate(model: PreTrainedModel, **options: Any) -> list[list[int]]:
    torch.manual_seed(0)
    return model.generate(PROMPT, max_new_tokens=20, **{"do_sample": False, **options}).tolist()


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating(way: str, architecture: str, save: Save) -> None:
    reference = build(architecture)
    attached = fiddler.attach(save(reference))
    assert generate(attached, **WAYS[way]) == generate(reference, **WAYS[way])


def test_assisted_decoding(save: Save) -> None:
    reference, assistant = build("qwen3_moe"), build("qwen3_moe", seed=1)
    attached = fiddler.attach(save(reference))
    assert generate(attached, assistant_model=assistant) == generate(reference)


def test_beams_are_reranked_and_reordered(save: Save) -> None:
    """Beam search is not greedy search w times over: it finds a likelier sequence by changing its mind."""
    reference = build("mixtral")
    attached = fiddler.attach(save(reference))

    def score(sequence: list[int]) -> float:
        tokens = torch.tensor([sequence])
        with torch.inference_mode():
            logprobs = attached(tokens).logits.log_softmax(-1)
        n = PROMPT.shape[1]
        return float(logprobs[0, n - 1 : -1].gather(1, tokens[0, n:, None]).sum())

    (greedy,), (beam,) = generate(attached), generate(attached, num_beams=8)
    assert beam != greedy
    assert score(beam) > score(greedy)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "nemotron_h", "aria"])
def test_a_loaded_model_is_changed_in_place_and_keeps_its_weights(architecture: str) -> None:
    model = build(architecture)
    expected = generate(model)
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert fiddler.attach(model) is model
    assert model.config._experts_implementation == "fiddler"
    assert generate(model) == expected
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers


def test_a_model_without_the_seam_is_refused(save: Save) -> None:
    dense = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32))
    for model in (dense, save(dense)):
        with pytest.raises(
            UnsupportedModelError, match="'gpt2' has no experts behind transformers' experts registry"
        ):
            fiddler.attach(model)


def test_what_is_neither_folder_nor_hub_id_is_refused() -> None:
    with pytest.raises(CheckpointError, match="neither a checkpoint folder nor a hub id"):
        fiddler.attach("no such folder")
    with pytest.raises(CheckpointError, match="not in the hub cache"):
        fiddler.attach("nobody/nothing-at-all")
