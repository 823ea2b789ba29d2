"""GGUF files are run as the model that they were made from: log-probabilities, against transformers on a twin."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from fiddler import EngineConfig, UnsupportedModelError
from fiddler.errors import CheckpointError, ModelError
from fiddler.formats.packed import Code, Packed
from fiddler.models import gguf_config
from fiddler.models.loaded import load
from tests.formats.folders import WAYS, Pair, error
from tests.formats.gguf_marks import needs_tables
from tests.formats.gguf_writer import Types, of_experts, write_pair

pytestmark = [pytest.mark.anyio, needs_tables]
WITHIN = 1e-4
"""Of log-probabilities, in float32."""

# Every architecture, every type of experts, and types of the dense part that only gguf-py decodes.
CASES: Mapping[str, tuple[str, Types]] = {
    "qwen3moe Q4_K": ("qwen3moe", of_experts("Q4_K", "Q6_K")),
    "qwen3moe Q8_0": ("qwen3moe", of_experts("Q8_0", "BF16")),
    "qwen2moe Q5_K": ("qwen2moe", of_experts("Q5_K", "Q5_0")),
    "gpt-oss MXFP4": ("gpt-oss", of_experts("MXFP4", "Q8_0")),
    "minimax-m2 Q6_K": ("minimax-m2", of_experts("Q6_K", "Q4_1")),
    "qwen35moe Q4_0": ("qwen35moe", of_experts("Q4_0")),
    "gpt-oss F16": ("gpt-oss", of_experts("F16", "F16")),
}


async def holds(pair: Pair) -> None:
    """Hold the engine's log-probabilities against the twin's, wherever experts are read from."""
    (named,) = json.loads((pair.twin / "config.json").read_text())["architectures"]
    model = getattr(transformers, named).from_pretrained(pair.twin, dtype=torch.float32).eval()
    for way in WAYS:
        worst = await error(pair, model, EngineConfig(dtype="float32", kernels="linear", **way))
        assert worst < WITHIN, way


@pytest.mark.parametrize("case", CASES)
async def test_a_file_is_the_model_it_was_made_from(case: str, tmp_path: Path) -> None:
    await holds(write_pair(tmp_path, *CASES[case]))


async def test_types_differ_between_layers_and_matrices(tmp_path: Path) -> None:
    """As in Q4_K_M, where some layers have down in Q6_K; with words that serve as output, and in three parts."""

    def mixed(name: str) -> str:
        return "Q6_K" if name in ("blk.1.ffn_down_exps.weight", "token_embd.weight") else "Q4_K"

    await holds(write_pair(tmp_path, "qwen3moe", mixed, tied=True, n_parts=3))


@pytest.mark.parametrize("kind", ["qwen3moe", "gpt-oss"])
async def test_gate_and_up_may_be_one_tensor(kind: str, tmp_path: Path) -> None:
    await holds(write_pair(tmp_path, kind, of_experts("Q8_0"), joined=True))


async def test_positions_are_stretched_as_the_file_says(tmp_path: Path) -> None:
    config = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    stated = {f"rope.scaling.{name}": config[of] for name, of in (("type", "rope_type"), ("factor", "factor"))}
    stated["rope.scaling.original_context_length"] = 128
    await holds(write_pair(tmp_path, "qwen3moe", of_experts("Q8_0"), config={"rope_parameters": config}, **stated))


async def test_a_block_that_guesses_ahead_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = gguf.GGUFWriter.write_header_to_file

    def with_one_more(writer: Any, *args: Any) -> None:
        for name in ("nextn.eh_proj", "attn_q", "ffn_up_exps"):
            rows = gguf.quants.quantize(np.ones((4, 32), np.float32), gguf.GGMLQuantizationType.Q5_0)
            writer.add_tensor(f"blk.2.{name}.weight", rows, raw_dtype=gguf.GGMLQuantizationType.Q5_0)
        add(writer, *args)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_one_more)
    await holds(write_pair(tmp_path, "qwen35moe", of_experts("Q8_0"), block_count=3, nextn_predict_layers=1))


async def test_our_kernels_multiply_with_them(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "qwen3moe", of_experts("Q4_K", "Q8_0"))
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(pair.twin, dtype=torch.bfloat16).eval()
    assert await error(pair, model, EngineConfig(dtype="bfloat16", device="cpu")) < 0.02


def test_experts_stay_packed_in_the_file(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "qwen3moe", of_experts("Q4_K"))
    loaded = load(pair.quantised, EngineConfig(store="mapped", kernels="linear"))
    weights = loaded.weights(1, 3)
    assert all(isinstance(matrix, Packed) and matrix.code is Code.Q4_K for matrix in weights.matrices)
    assert len({matrix.codes.untyped_storage().data_ptr() for matrix in weights.matrices}) == 1  # the mapped file
    assert loaded.dtype is torch.bfloat16


TYPES: Mapping[str, tuple[Types, str]] = {
    "experts in Q5_0": (
        of_experts("Q5_0"),
        r"ffn_down_exps.weight is Q5_0.*Q4_0, Q8_0, MXFP4, Q4_K, Q5_K, Q6_K.*Q4_K_M",
    ),
    "gate and up in two types": (
        lambda name: "Q8_0" if "gate_exps" in name else "Q4_0" if "exps" in name else "F32",
        r"gate_exps.weight' is q8_0 .*up_exps.weight' is q4_0 .*in one format for a layer: use another",
    ),
    "gate in blocks and up in floats": (
        lambda name: "Q8_0" if "gate_exps" in name else "BF16" if "exps" in name else "F32",
        r"gate_exps.weight' is q8_0 .*up_exps.weight' is BF16, .*in one format for a layer",
    ),
}
CHANGED: Mapping[str, tuple[str, dict[str, Any], type[ModelError], str]] = {
    "no number of experts": (
        "qwen3moe",
        {"expert_count": None},
        CheckpointError,
        "says .*expert_count=None",
    ),
    "no visits": ("qwen3moe", {"expert_used_count": 0}, CheckpointError, "says qwen3moe.expert_used_count=0"),
    "no small number": ("qwen3moe", {"attention.layer_norm_rms_epsilon": math.nan}, CheckpointError, "says .*=nan"),
    "no heads of keys": ("qwen35moe", {"ssm.group_count": 0}, CheckpointError, "describe no qwen35moe: .* by zero"),
    "no factor": (
        "gpt-oss",
        {"rope.scaling.factor": -1.0},
        CheckpointError,
        "says gpt-oss.rope.scaling.factor=-1.0, which cannot be",
    ),
    "other experts": ("qwen3moe", {"expert_count": 9}, CheckpointError, "mismatched weights.*gate.weight"),
    "no width": ("qwen3moe", {"embedding_length": "x"}, CheckpointError, "says qwen3moe.embedding_length='x'"),
    "another width": ("qwen3moe", {"embedding_length": 512}, CheckpointError, "mismatched weights"),
    "other experts' width": (
        "qwen3moe",
        {"expert_feed_forward_length": 128},
        CheckpointError,
        "gate_up_proj has",
    ),
    "endless layers": ("qwen3moe", {"block_count": 1 << 31}, CheckpointError, "no model has so many"),
    "more layers": ("qwen3moe", {"block_count": 3}, CheckpointError, "asks for 3 layers"),
    "fewer layers": ("qwen3moe", {"block_count": 1}, UnsupportedModelError, "no place in"),
    "no convolution": ("qwen35moe", {"ssm.conv_kernel": None}, CheckpointError, "ssm.conv_kernel"),
    "other heads": ("qwen35moe", {"ssm.time_step_rank": 8}, ModelError, "A_log.* do not fit each other"),
    "stretched otherwise": (
        "qwen3moe",
        {"rope.scaling.type": "longrope"},
        UnsupportedModelError,
        "'longrope'",
    ),
    "stretched by more": (
        "qwen3moe",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 2.0},
        UnsupportedModelError,
        "attn_factor",
    ),
}


@pytest.mark.parametrize("case", TYPES)
def test_types_that_are_not_run_are_named(case: str, tmp_path: Path) -> None:
    types, match = TYPES[case]
    pair = write_pair(tmp_path, "qwen3moe", types)
    with pytest.raises(UnsupportedModelError, match=match):
        load(pair.quantised, EngineConfig(kernels="linear"))


@pytest.mark.parametrize("case", CHANGED)
def test_metadata_that_make_no_model_are_refused(case: str, tmp_path: Path) -> None:
    kind, changes, refusal, match = CHANGED[case]
    pair = write_pair(tmp_path, kind, of_experts("Q8_0"), **changes)
    with pytest.raises(refusal, match=match):
        load(pair.quantised, EngineConfig(kernels="linear"))


def small(file: Path, architecture: str, **tensors: Any) -> Path:
    """Write a file that holds hardly anything."""
    writer = gguf.GGUFWriter(file, architecture)
    for name, tensor in (tensors or {"token_embd": np.zeros((4, 32), np.float32)}).items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("architecture", ["llama", "deepseek2", "clip"])
def test_other_architectures_are_refused_by_name(architecture: str, tmp_path: Path) -> None:
    file = small(tmp_path / "m.gguf", architecture)
    with pytest.raises(UnsupportedModelError, match=f"'{architecture}'.*qwen2moe, qwen3moe, "):
        load(file, EngineConfig())


def test_a_tensor_without_a_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would change results, as `rope_freqs` does, and go unnoticed."""
    add = gguf.GGUFWriter.write_header_to_file

    def with_one_more(writer: Any, *args: Any) -> None:
        writer.add_tensor("rope_freqs.weight", np.ones(32, np.float32))
        add(writer, *args)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_one_more)
    pair = write_pair(tmp_path, "qwen3moe", of_experts("Q8_0"))
    with pytest.raises(UnsupportedModelError, match=r"'rope_freqs.weight'.*no place in Qwen3Moe"):
        load(pair.quantised, EngineConfig())


def test_a_missing_tensor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = gguf.GGUFWriter.add_tensor
    for missing, match in (
        ("blk.1.attn_q.weight", r"missing weights: 1, first model.layers.1.self_attn.q_proj.weight"),
        ("blk.0.ffn_up_exps.weight", r"no tensor 'blk.0.ffn_up_exps.weight'"),
        ("token_embd.weight", "no token_embd.weight"),
    ):

        def but_one(writer: Any, name: str, *args: Any, without: str = missing, **options: Any) -> None:
            if name != without:
                add(writer, name, *args, **options)

        monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", but_one)
        pair = write_pair(tmp_path / missing, "qwen3moe", of_experts("Q8_0"))
        with pytest.raises(CheckpointError, match=match):
            load(pair.quantised, EngineConfig(kernels="linear"))


def test_without_gguf_py_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = small(tmp_path / "m.gguf", "qwen3moe")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedModelError, match=r"pip install 'fiddler-moe\[gguf\]'"):
        load(file, EngineConfig())


def test_an_older_transformers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_config, "NEEDED", (99, 0))
    with pytest.raises(UnsupportedModelError, match=r"need transformers 99\.0 or later"):
        load(small(tmp_path / "m.gguf", "qwen3moe"), EngineConfig())
