"""Opening a model: where it is found, what is refused, and that every refusal says what to change."""

import json
import shutil
import threading
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from safetensors.torch import load_file, save_file
from transformers.utils.loading_report import LoadStateDictInfo

from fiddler import (
    CheckpointError,
    ConfigError,
    Engine,
    EngineClosedError,
    EngineConfig,
    ModelError,
    UnsupportedModelError,
)
from fiddler.cli.facts import read_facts
from fiddler.models.loaded import ServableModel, load
from fiddler.models.seam import find_experts
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.folder import SINGLE, find_checkpoint
from tests.architectures import architectures, build
from tests.support.tiny import save_tiny


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def opened(folder: str | Path, **options: Any) -> ServableModel:
    return load(folder, EngineConfig(**options))


def test_a_hub_id_resolves_from_the_local_cache(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--somebody--tiny-moe"
    revision = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(tiny, repository / "snapshots" / revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_checkpoint("somebody/tiny-moe") == repository / "snapshots" / revision
    assert opened("somebody/tiny-moe").n_experts == opened(tiny).n_experts


@pytest.mark.parametrize("name", ["nothing", "/no/such/folder", "./nothing", "a/b/c"])
def test_what_cannot_be_a_model_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="neither a checkpoint folder nor a hub id"):
        find_checkpoint(name)


def test_a_folder_without_a_configuration(tiny: Path) -> None:
    (tiny / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        opened(tiny)
    (tiny / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        opened(tiny)


def test_an_unknown_architecture(tiny: Path) -> None:
    edit_config(tiny, model_type="mixture_of_wonders")
    with pytest.raises(UnsupportedModelError, match="does not know 'mixture_of_wonders'"):
        opened(tiny)


def test_a_quantised_checkpoint(tiny: Path) -> None:
    edit_config(tiny, quantization_config={"quant_method": "quark", "bits": 8})
    with pytest.raises(
        UnsupportedModelError, match=r"quantised \('quark'\).* use a bf16 checkpoint \(about 0\.0 GB"
    ):
        opened(tiny)


def test_dense_weights_that_are_missing(tiny: Path) -> None:
    edit_weights(tiny, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"missing weights: 1, first model\.norm\.weight"):
        opened(tiny)


def test_an_expert_that_is_missing(tiny: Path) -> None:
    edit_weights(tiny, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts"):
        opened(tiny)


def test_weights_of_another_shape(tiny: Path) -> None:
    edit_config(tiny, vocab_size=7)
    with pytest.raises(CheckpointError, match=r"mismatched weights: 2, first \('lm_head"):
        opened(tiny)


CODE = """
from transformers import PretrainedConfig
from pathlib import Path
Path(__file__).with_name("ran").touch()
class Config(PretrainedConfig):
    model_type = "mine"
"""


def test_code_in_a_checkpoint_runs_only_when_asked_for(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    (tiny / "code.py").write_text(CODE)
    edit_config(tiny, model_type="mine", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(UnsupportedModelError, match="trust_remote_code=True"):
        opened(tiny)
    assert not list(modules.rglob("ran"))
    with pytest.raises(UnsupportedModelError):
        opened(tiny, trust_remote_code=True)  # its code runs, and brings no model
    assert list(modules.rglob("ran"))


def test_pickled_weights_are_not_opened(tiny: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights, which are never opened"):
        opened(tiny)


def test_a_context_longer_than_the_models(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="max_context=100000"):
        opened(tiny, max_context=100_000)


@pytest.mark.anyio
async def test_a_model_that_is_made_is_opened_like_a_checkpoint(tiny: Path) -> None:
    config = EngineConfig(kernels="linear", record=True)
    asked: list[tuple[EngineConfig, str]] = []

    def make(options: EngineConfig) -> ServableModel:
        asked.append((options, threading.current_thread().name))
        return load(tiny, options)

    async with Engine(tiny, config) as engine:
        expected = await engine.generate([1, 2, 3], max_new_tokens=5, do_sample=False)
        assert engine.routing().model == tiny.name
    engine = Engine(make, config)
    assert asked == []
    async with engine:
        found = await engine.generate([1, 2, 3], max_new_tokens=5, do_sample=False)
    assert asked == [(config, "fiddler-engine")]
    assert found.token_ids == expected.token_ids
    assert engine.routing().model == str(tiny)  # what transformers has loaded it from


@pytest.mark.anyio
async def test_what_making_a_model_raises_is_raised_by_opening() -> None:
    def make(options: EngineConfig) -> ServableModel:
        raise ConfigError(f"no memory for device={options.device!r}")

    engine = Engine(make)
    with pytest.raises(ConfigError, match="no memory for device='auto'"):
        async with engine:
            pass
    with pytest.raises(EngineClosedError):
        engine.generate_stream([1])


@pytest.mark.parametrize("store", ["mapped", "packed"])
@pytest.mark.parametrize("name", [n for n in ("ernie4_5_vl_moe", "dots3_note_multimodal") if n in architectures()])
def test_experts_that_no_text_visits_take_no_part(name: str, store: Any, save: Any) -> None:
    model = build(name)
    every = len(find_experts(model))
    loaded = load(save(model), EngineConfig(store=store))
    assert len(loaded.n_experts) == len(loaded.experts) < every
    assert not any("vision" in path for path in loaded.experts)


ENDLESS = (
    "[" * 100_000,
    '{"model_type": ' + "[" * 100_000,
    '{"model_type": "qwen3_moe", "x": ' + "[" * 900 + "]" * 900 + "}",
)


@pytest.mark.parametrize("content", ENDLESS, ids=["list", "object", "whole"])
def test_a_configuration_nested_too_deeply(tiny: Path, content: str) -> None:
    (tiny / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        opened(tiny)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": []}, "no model_type that is a name"),
        ({"model_type": None}, "no model_type that is a name"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"num_hidden_layers": 1000}, "asks for 1000 layers, and the files hold 8"),
        ({"num_labels": 10**9}, "num_labels=1000000000"),
        ({"num_experts_per_tok": 9}, "sends each token to 9 experts of a layer that has 8"),
        ({"num_experts_per_tok": -1}, "sends each token to -1 experts"),
        ({"max_position_embeddings": -1}, "max_position_embeddings=-1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0, which is no length"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": "x"}}, r"stretched by \['x'\], which is no length"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": inf}}, "which is no length"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": -2.0}}, "which is no length"),
        ({"num_hidden_layers": "3"}, "does not describe a 'qwen3_moe' model; correct it"),
        ({"text_config": {}}, "does not describe a 'qwen3_moe' model"),
        ({"quantization_config": 5}, r"quantised \(5\)"),
        ({"quantization_config": {}}, r"quantised \('unknown'\)"),
        ({"quantization_config": {"quant_method": []}}, r"quantised \(\[\]\)"),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, r"quantised \('hqq'\)"),
        ({"vocab_size": 10**9}, "describes a dense part of"),
        ({"head_dim": 10**9}, "describes a dense part of"),
        ({"vocab_size": -5}, "cannot"),
        ({"num_attention_heads": 0}, "cannot"),
        ({"hidden_act": "nonsense"}, r"cannot .*; check config\.json"),
    ],
    ids=str,
)
def test_a_configuration_of_nonsense_is_a_sentence(tiny: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(tiny, **changes)
    with pytest.raises(ModelError, match=message):
        opened(tiny)
    with pytest.raises(ModelError, match=message):
        read_facts(tiny, trust_remote_code=False)


@pytest.mark.parametrize(
    "name",
    [
        "generation_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "merges.txt",
    ],
)
def test_a_huge_file_is_not_read(tiny: Path, name: str) -> None:
    (tiny / name).parent.mkdir(exist_ok=True)
    with (tiny / name).open("wb") as stream:
        stream.truncate(1 << 40)  # all of it a hole
    with pytest.raises(CheckpointError, match=rf"{name}.* has 1099511627776 bytes"):
        opened(tiny)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        SINGLE,
        "generation_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    ],
)
def test_a_link_that_cannot_be_followed(tiny: Path, name: str) -> None:
    """As one into a folder that others may not enter, which root enters."""
    (tiny / name).unlink()
    (tiny / name).symlink_to("x" * 300)
    with pytest.raises(CheckpointError, match=name):
        opened(tiny)


def test_what_safetensors_calls_a_missing_file(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fiddler.store.checkpoint.open_regular", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        Checkpoint.open(tiny)


def test_tensors_without_a_place_are_not_told_one_by_one(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[str | None] = []
    make = LoadStateDictInfo.create_loading_report
    monkeypatch.setattr(
        LoadStateDictInfo, "create_loading_report", lambda *a: reports.append(make(*a)) or reports[-1]
    )
    edit_weights(tiny, lambda tensors: tensors.update(unknown=tensors["model.norm.weight"].clone()))
    opened(tiny)
    assert reports == [None]


def test_no_quantisation_may_be_written_down(tiny: Path) -> None:
    edit_config(tiny, quantization_config=None)
    assert opened(tiny).n_experts == (8, 8, 8)


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "gemma4_multimodal", "qwen3_5_moe_multimodal"])
async def test_towers_may_be_missing_and_nothing_of_the_text(name: str, save: Any) -> None:
    folder = save(build(name))
    async with Engine(folder) as engine:
        expected = await engine.generate([1, 2, 3], max_new_tokens=5, do_sample=False)
    towers = ("visual", "vision", "audio")

    def strip(tensors: dict[str, Any]) -> None:
        for lost in [key for key in tensors if any(tower in key for tower in towers)]:
            del tensors[lost]

    edit_weights(folder, strip)
    async with Engine(folder) as engine:
        found = await engine.generate([1, 2, 3], max_new_tokens=5, do_sample=False)
    assert found.token_ids == expected.token_ids
    dense = [key for key in load_file(folder / "model.safetensors") if "norm" in key]
    for lost in (dense[0], dense[-1]):
        edit_weights(folder, lambda tensors, lost=lost: tensors.pop(lost))
        with pytest.raises(CheckpointError, match="missing weights"):
            opened(folder)
