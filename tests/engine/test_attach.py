"""Fiddler's experts under plain transformers: every way of generating says what it says with transformers' own."""

import copy
import io
import pickle
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

import fiddler
from fiddler import CheckpointError, EngineConfig, ModelError, UnsupportedModelError
from fiddler.models.seam import find_experts
from tests.architectures import architectures, build

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


@pytest.mark.parametrize(("way", "architecture"), list(zip(WAYS, cycle(["mixtral", "gpt_oss", "deepseek_v3"]))))
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


@pytest.mark.parametrize(
    "architecture", sorted({"mixtral", "gpt_oss", "nemotron_h", "aria"} & set(architectures()))
)
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


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(PROMPT).logits
    return found


def visits(model: PreTrainedModel) -> torch.Tensor:
    """What the first layer's experts, two to a row, make of rows: numbers up to 20."""
    random, experts = torch.Generator().manual_seed(0), first_experts(model)
    rows = torch.randn(12, model.config.hidden_size, generator=random).to(model.dtype)
    index = torch.stack([torch.arange(12) % 4, torch.arange(12) % 3 + 4], dim=1)
    with torch.no_grad():
        found: torch.Tensor = experts(rows, index, torch.rand(12, 2, generator=random).to(model.dtype))
    return found


def assert_same(actual: Any, expected: Any) -> None:
    found, right = logits(actual), logits(expected)
    assert found.dtype == right.dtype
    if found.dtype.itemsize > 2:
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    else:  # the same experts for the same rows: in 16 bits a router may choose others
        torch.testing.assert_close(visits(actual), visits(expected), rtol=2e-2, atol=0.2)


def first_experts(model: PreTrainedModel) -> Any:
    return next(iter(find_experts(model).values()))


class Half(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


CHANGES: dict[str, Callable[[PreTrainedModel], object]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "there and back": lambda model: model.to(torch.bfloat16).float(),
    "double": lambda model: model.double(),
    "in place": lambda model: first_experts(model).down_proj.data.mul_(0.5),
    "another parameter": lambda model: setattr(
        first_experts(model), "down_proj", nn.Parameter(first_experts(model).down_proj.detach() / 2)
    ),
    "an adapter": lambda model: parametrize.register_parametrization(first_experts(model), "gate_up_proj", Half()),
    "another activation": lambda model: setattr(first_experts(model), "act_fn", nn.ReLU()),
    "loaded": lambda model: model.load_state_dict(build(model.config.model_type, seed=1).state_dict()),
    "resized": lambda model: model.resize_token_embeddings(300, mean_resizing=False),
    "tied": lambda model: model.tie_weights(),
    "shared memory": lambda model: model.share_memory(),
    "transformers' own": lambda model: model.set_experts_implementation("eager"),
}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_loaded_model_can_still_be_changed(change: str, architecture: str) -> None:
    reference, attached = build(architecture), fiddler.attach(build(architecture))
    assert_same(attached, reference)
    for model in (reference, attached):
        torch.manual_seed(0)
        CHANGES[change](model)
    assert_same(attached, reference)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_a_loaded_model_is_saved_copied_and_pickled_whole(architecture: str, save: Save) -> None:
    reference, attached = build(architecture), fiddler.attach(build(architecture))
    assert attached.state_dict().keys() == reference.state_dict().keys()
    saved = type(reference).from_pretrained(save(attached))
    copies = copy.deepcopy(attached), pickle.loads(pickle.dumps(attached))
    for other in (saved, *copies):
        assert_same(other, reference)
    for each in copies:
        first_experts(each).down_proj.data.zero_()
        assert not torch.allclose(logits(each), logits(reference), atol=1e-3)
    assert_same(attached, reference)


@pytest.mark.parametrize("form", ["folder", "loaded"])
def test_gradients_are_transformers_own(form: str, save: Save) -> None:
    reference = build("qwen3_moe")
    attached = fiddler.attach(save(reference) if form == "folder" else build("qwen3_moe"))
    expected = dict(reference.named_parameters())
    for model in (reference, attached):
        model.train()
        model(PROMPT, labels=PROMPT).loss.backward()
    found = dict(attached.named_parameters())
    assert found
    assert len(found) == len(expected) or form == "folder"
    for name, parameter in found.items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4)


def test_a_loaded_model_keeps_nothing_of_the_calls() -> None:
    attached = fiddler.attach(build("qwen3_moe").bfloat16())
    logits(attached)
    own = first_experts(attached)._fiddler[1]
    lane = own._known[1]
    n_known = len(lane.device._outlines)
    logits(attached)
    assert own._known[1] is lane
    assert len(lane.device._outlines) == n_known


def adapt_parameters(model: nn.Module, target: str) -> list[nn.Parameter]:
    """Find parameters as peft does for `target_parameters`, and read them."""
    found = []
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if f"{path}.{name}".endswith(target):
                found.append(getattr(module, name))
    return found


class ModulesToSave(nn.Module):
    """A part and the copy of it that learns, as peft puts them in its place."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.original_module = part
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(part)})


REFUSED: dict[str, tuple[str, Callable[[Any], object]]] = {
    "save_pretrained": ("copy that checkpoint", lambda model: model.save_pretrained("nowhere")),
    "push_to_hub": ("upload that checkpoint", lambda model: model.push_to_hub("nobody/nothing")),
    "state_dict": ("copy that checkpoint", lambda model: model.state_dict()),
    "state_dict of a part": ("copy that checkpoint", lambda model: model.model.layers[0].state_dict()),
    "load_state_dict": (
        "load the model with transformers",
        lambda m: m.load_state_dict(build("qwen3_moe").state_dict()),
    ),
    "load in part": (
        "load the model with transformers",
        lambda m: m.load_state_dict(build("qwen3_moe").state_dict(), strict=False),
    ),
    "pickle": ("attach to that checkpoint again", pickle.dumps),
    "pickle of a part": ("attach to that checkpoint again", lambda model: pickle.dumps(model.model.layers)),
    "half": (r"EngineConfig\(dtype='float16'\)", lambda model: model.half()),
    "bfloat16": (r"EngineConfig\(dtype='bfloat16'\)", lambda model: model.bfloat16()),
    "double": ("float64", lambda model: model.double()),
    "to dtype": (r"EngineConfig\(dtype='bfloat16'\)", lambda model: model.to(torch.bfloat16)),
    "a part": (r"EngineConfig\(dtype='float16'\)", lambda model: model.model.half()),
    "meta": ("moving the model to meta", lambda model: model.to("meta")),
    "to_empty": ("moving the model to meta", lambda model: model.to_empty(device="meta")),
    "reading a parameter": ("is not in the model", lambda model: first_experts(model).down_proj),
    "setting one": (
        "would have no effect",
        lambda m: setattr(first_experts(m), "down_proj", nn.Parameter(torch.ones(8))),
    ),
    "registering one": (
        "would have no effect",
        lambda model: first_experts(model).register_parameter("gate_up_proj", nn.Parameter(torch.ones(8))),
    ),
    "another implementation": ("would not find them", lambda model: model.set_experts_implementation("eager")),
    "another activation": (
        "would have no effect",
        lambda model: setattr(first_experts(model), "act_fn", nn.ReLU()),
    ),
    "an adapter": ("is not in the model", lambda model: adapt_parameters(model, "mlp.experts.gate_up_proj")),
    "a part that learns and is saved": (
        "with modules_to_save would neither train nor save them",
        lambda model: setattr(model.model.layers[0], "mlp", ModulesToSave(model.model.layers[0].mlp)),
    ),
    "saving what peft's own library adapted": (
        "copy that checkpoint",
        lambda model: (setattr(model, "peft_config", {}), model.save_pretrained("nowhere")),
    ),
    "attaching again": ("attached already", fiddler.attach),
}


@pytest.mark.parametrize("action", REFUSED)
def test_what_needs_experts_inside_is_refused_and_changes_nothing(action: str, save: Save, tmp_path: Path) -> None:
    reference = build("qwen3_moe")
    attached = fiddler.attach(save(reference))
    remedy, act = REFUSED[action]
    with pytest.raises(ModelError, match=remedy):
        act(attached)
    assert {(p.dtype, p.device.type) for p in attached.parameters()} == {(torch.float32, "cpu")}
    assert not Path("nowhere").exists()
    assert_same(attached, reference)


def test_a_model_from_a_folder_is_copied_and_its_dense_part_changed(save: Save) -> None:
    reference = build("qwen3_moe")
    attached = fiddler.attach(save(reference))
    assert attached.num_parameters() == reference.num_parameters()
    assert not hasattr(first_experts(attached), "down_proj")
    made = copy.deepcopy(attached)
    for parameter in made.parameters():
        parameter.data.zero_()
    assert_same(attached, reference)
    for model in (attached, reference):
        model.to("cpu").float().share_memory()
        model.tie_weights()
        model.resize_token_embeddings(300, mean_resizing=False)
        model.model.layers[0].self_attn.q_proj.weight.data.mul_(0.5)
    assert logits(attached).shape[-1] == 300
    torch.testing.assert_close(logits(attached)[..., :190], logits(reference)[..., :190], rtol=1e-4, atol=1e-4)


def test_adapters_of_the_dense_part_are_saved(save: Save) -> None:
    """peft, which is not here, leaves its configuration at the model and reads its adapters from the state."""
    reference = build("qwen3_moe")
    attached = fiddler.attach(save(reference))
    attached.peft_config = {"default": SimpleNamespace()}
    state = attached.state_dict()
    assert state.keys() == reference.state_dict().keys()
    torch.save({name: tensor for name, tensor in state.items() if "q_proj" in name}, io.BytesIO())
    for use in (lambda: torch.save(state, io.BytesIO()), lambda: build("qwen3_moe").load_state_dict(state)):
        with pytest.raises(ModelError, match="is not in the model"):
            use()
    assert "is not in the model" in repr(state)


@pytest.mark.parametrize("form", ["folder", "loaded"])
def test_a_part_is_copied_alone(form: str, save: Save) -> None:
    reference = build("qwen3_moe")
    attached = fiddler.attach(save(reference) if form == "folder" else build("qwen3_moe"))
    copied: dict[int, Any] = {}
    part = copy.deepcopy(attached.model.layers[0], copied)
    assert sum(isinstance(made, nn.Module) for made in copied.values()) == len(list(part.modules()))
    attached.model.layers[0] = part
    assert_same(attached, reference)


def test_another_dtype_is_had_by_asking_for_it(save: Save) -> None:
    reference = build("qwen3_moe")
    attached = fiddler.attach(save(reference), EngineConfig(dtype="bfloat16"))
    assert_same(attached, reference.to(torch.bfloat16))
