"""Opening a quantised checkpoint: what is built, what it costs, and what is told of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fiddler import Engine, EngineConfig
from fiddler.cli import app
from fiddler.cli.facts import read_facts
from fiddler.formats.find import find
from fiddler.formats.names import groups
from fiddler.formats.packed import Packed
from fiddler.formats.quantised import Quantised
from fiddler.models import seam
from fiddler.models.loaded import load
from fiddler.store.checkpoint import Entry
from tests.formats.folders import WAYS, save_pair
from tests.formats.writers import fp8, integers, nvfp4
from tests.support.entries import entries

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.anyio
@pytest.mark.parametrize("way", WAYS, ids=["mapped", "packed", "sim"])
async def test_no_module_is_replaced_and_no_quantiser_runs(tmp_path: Path, way: dict[str, Any]) -> None:
    """The classes are those of a model in floats, experts stay empty, and matrices are packed when they run."""
    pair = save_pair(tmp_path, "qwen3_moe", fp8(128, 128), FP8)
    config = EngineConfig(**way)
    quantised, plain = load(pair.quantised, config), load(pair.twin, config)
    kinds = [[type(module) for module in each.model.modules()][1:] for each in (quantised, plain)]
    assert kinds[0] == kinds[1]
    assert all(module.down_proj.numel() == 0 for module in seam.find_experts(quantised.model).values())
    assert not hasattr(quantised.model, "hf_quantizer")
    assert not hasattr(quantised.model.config, "quantization_config")
    assert all(isinstance(m, Packed) for layer in range(2) for m in quantised.weights(layer, 5).matrices)
    async with Engine(pair.quantised, config) as engine:
        await engine.generate([1, 2, 3, 4, 5], max_new_tokens=4)
        now = engine.statistics()
    assert now.expert_bytes == now.n_expert_loads * quantised.weights(0, 0).nbytes


def test_mapped_experts_are_views_of_the_file(tmp_path: Path) -> None:
    folder = save_pair(tmp_path, "qwen3_moe", fp8(128, 128), FP8).quantised
    store: Any = load(folder, EngineConfig(store="mapped")).store
    starts = {mapping.bytes.data_ptr() for mapping in store.checkpoint._mappings.values()}
    for matrix in store.weights(0, 0).matrices:
        assert {part.untyped_storage().data_ptr() for part in matrix.parts} <= starts


def test_gate_and_up_are_one_matrix_where_they_lie_back_to_back(tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 128, "intermediate_size": 128}
    joined = load(save_pair(tmp_path / "a", "qwen3_moe", fp8(128, 128), FP8, **sizes).quantised, EngineConfig())
    assert [m.shape for m in joined.weights(0, 0).up] == [(256, 192)]
    apart = load(save_pair(tmp_path / "b", "qwen3_moe", fp8(128, 128), FP8).quantised, EngineConfig())
    assert [m.shape for m in apart.weights(0, 0).up] == [(160, 192)] * 2, "a block would be of both"
    scaled = nvfp4("weight", "weight_scale_2")
    factors = load(save_pair(tmp_path / "c", "qwen3_moe", scaled, FP8, **sizes).quantised, EngineConfig())
    assert len(factors.weights(0, 0).up) == 2, "each has a factor of its own"


@pytest.mark.parametrize("quantised", [True, False], ids=["quantised", "floats"])
def test_a_tensor_costs_few_calls(quantised: bool) -> None:
    """Large checkpoints have 75,000 matrices: half a second."""
    stored, n = dict[str, Entry](), 4 * 64 * 3
    for layer in range(4):
        for expert in range(64):
            for matrix, shape in (("gate", (1536, 4096)), ("up", (1536, 4096)), ("down", (4096, 1536))):
                base = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}_proj.weight"
                stored[base] = Entry(Path("x"), 0, 1, "F8_E4M3" if quantised else "BF16", shape)
                if quantised:
                    grid = shape[0] // 128, shape[1] // 128
                    stored[f"{base}_scale_inv"] = Entry(Path("x"), 0, 1, "F32", grid)
    made: list[dict[str, Any]] = []

    def read() -> None:
        found = groups(stored)
        made.append(find(found, stored, FP8, None) if found else stored)  # type: ignore[arg-type]

    called = entries(read)
    assert len(made[0]) == n
    assert all(isinstance(entry, Quantised) for entry in made[0].values()) is quantised
    assert len(called) < (6 * n if quantised else 10)


def test_inspect_tells_the_format_and_the_bytes(tmp_path: Path) -> None:
    settings = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4}}}}
    folder = save_pair(tmp_path, "qwen3_moe", integers(4, 32), settings).quantised
    facts = read_facts(folder, trust_remote_code=False)
    assert facts.sizes.bytes_per_expert == 3 * 160 * 192 * 4.5 / 8
    assert facts.experts_dtype == "int4"
    assert facts.dtype == "float32"
    said = CliRunner().invoke(app, ["inspect", "-m", str(folder)])
    assert said.exit_code == 0
    assert "int4" in said.output
    told = json.loads(CliRunner().invoke(app, ["inspect", "-m", str(folder), "--json"]).output)
    assert told["experts_dtype"] == "int4"
