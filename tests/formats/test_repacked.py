"""Quantised checkpoints whose codes lie in an order of their own: GPTQ, AWQ and NF4."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fiddler.config import EngineConfig
from fiddler.errors import UnsupportedModelError
from fiddler.models.loaded import load
from tests.formats.folders import agrees, packed_bits, save_pair
from tests.formats.writers import Writer, awq, gptq, nf4

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
SIXTY_FOUR = {
    "qwen3_moe": {"moe_intermediate_size": 128, "intermediate_size": 128},
    "mixtral": {"intermediate_size": 128},
}
"""Sizes that 64 divides."""
CASES: dict[str, tuple[Writer, dict[str, Any]]] = {
    "gptq": (gptq(4, 32), GPTQ),
    "gptq symmetric": (gptq(4, 32, symmetric=True), GPTQ | {"sym": True}),
    "gptq v2": (gptq(4, 32, version=2), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq 8": (gptq(8, 32), GPTQ | {"bits": 8}),
    "nf4": (nf4(nested=False), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "nf4 nested": (nf4(nested=True), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "awq": (awq(32), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
}


N_EXPERTS = 64
BITS = {"gptq": 4.75, "gptq v2": 4.75, "gptq 8": 8.75, "awq": 4.75}
"""Bits of a number where there are zeros; 4.5 where there are not."""


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("name", CASES)
async def test_values_are_those_of_transformers(tmp_path: Path, name: str, kind: str) -> None:
    write, settings = CASES[name]
    sizes = SIXTY_FOUR[kind] if "nf4" in name else {}
    pair = save_pair(tmp_path, kind, write, settings, **sizes)
    await agrees(pair)
    assert packed_bits(pair) == BITS.get(name, 4.5)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("name", ["gptq", "awq", "nf4 nested"])
def test_repacked_experts_take_no_more_than_their_bytes(tmp_path: Path, name: str) -> None:
    """Between temporaries on one heap, those of GPTQ took 2.7 times as much."""
    write, settings = CASES[name]
    parts, _ = write(torch.linspace(-1, 1, 512 * 512).sin().view(512, 512))
    stored = {
        f"experts.{expert}.{kind}_proj.{part}": tensor.clone(memory_format=torch.contiguous_format)
        for expert in range(N_EXPERTS)
        for kind in ("gate", "up", "down")
        for part, tensor in parts.items()
    }
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    command = [sys.executable, "-m", "tests.support.repacked_memory", str(tmp_path), str(N_EXPERTS)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root, check=True)
    taken, due = json.loads(done.stdout)
    assert due > 25
    assert taken < 1.2 * due + 8  # MB, temporaries of one expert among them


@pytest.mark.parametrize("store", ["mapped", "packed"])
def test_columns_in_the_order_of_activations_are_refused(tmp_path: Path, store: Any) -> None:
    folder = save_pair(tmp_path, "qwen3_moe", *CASES["gptq"]).quantised
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.0.down_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"0\.down_proj.*order of their activations \(desc_act"):
        load(folder, EngineConfig(store=store)).weights(1, 0)
    tensors[name] = (torch.arange(160) // 32).int()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert load(folder, EngineConfig(store=store)).weights(1, 0).nbytes
