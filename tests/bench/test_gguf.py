"""A GGUF file holds a checkpoint's numbers, and llama.cpp makes of them what transformers makes."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import fiddler
from bench import checkpoints
from bench.peers import gguf_file
from bench.peers.known import open_peer
from bench.workload import UnavailableError, Workload
from tests.architectures import build

Save = Callable[[PreTrainedModel], Path]

BLOCK = {
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
}
"""Names of the hub: a layer's experts, and an expert's gate, up and down."""
WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
"""Names of the hub by those of GGUF."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(checkpoints, "CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "gguf"


@pytest.fixture(params=["demo", "mixtral"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """In float32, with weights so wide that every part of the model shows in its logits."""
    if request.param == "mixtral":
        return build("mixtral")
    return AutoModelForCausalLM.from_pretrained(fiddler.DEMO, dtype=torch.float32)


def test_the_numbers_are_the_same(model: PreTrainedModel, save: Save) -> None:
    folder = save(model.bfloat16())
    kind = model.config.model_type
    weights = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    stored = gguf.GGUFReader(gguf_file.of(folder)).tensors
    assert sum(int(tensor.n_elements) for tensor in stored) == sum(tensor.numel() for tensor in weights.values())
    for tensor in stored:
        expected = of_the_hub(tensor.name, kind, weights)
        if kind == "mixtral" and tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            expected = expected[
                turned_rows(len(expected), model.config.hidden_size // model.config.num_attention_heads)
            ]
        values = torch.from_numpy(np.array(tensor.data).view(np.uint8))
        is_float32 = expected.ndim == 1 or "ffn_gate_inp" in tensor.name
        assert tensor.tensor_type.name == ("F32" if is_float32 else "BF16")
        values = values.view(torch.float32 if is_float32 else torch.bfloat16)
        assert torch.equal(values, expected.to(values.dtype)), tensor.name


def of_the_hub(name: str, kind: str, weights: dict[str, Tensor]) -> Tensor:
    block, gate, up, down = BLOCK[kind]
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if layer is None:
        return weights[f"{WHOLE[name.removesuffix('.weight')]}.weight"]
    prefix = f"model.layers.{layer[1]}"
    if layer[2] == "ffn_gate_inp":
        return weights[f"{prefix}.{block}.gate.weight"]
    part = {"ffn_gate_exps": gate, "ffn_up_exps": up, "ffn_down_exps": down}.get(layer[2])
    if part is None:
        return weights[f"{prefix}.{WHOLE[layer[2]]}.weight"]
    n_experts = sum(n.startswith(prefix) and n.endswith(f".{part}.weight") for n in weights)
    return torch.stack([weights[f"{prefix}.{block}.experts.{i}.{part}.weight"] for i in range(n_experts)])


def turned_rows(n_rows: int, head_dim: int) -> list[int]:
    """Row i of a head's first half, then row i of its second half, and so on."""
    return [
        head + row + half
        for head in range(0, n_rows, head_dim)
        for row in range(head_dim // 2)
        for half in (0, head_dim // 2)
    ]


def logits_of_llama_cpp(folder: Path, prompts: list[list[int]]) -> Tensor:
    """Feed all prompts side by side, token by token; returns `[B, T, V]`."""
    peer: Any = open_peer("llama.cpp", folder, threads=1)
    context = peer.context(len(prompts), len(prompts[0]))
    steps = [
        np.stack(context.decode([(ids[i], i, sequence, True) for sequence, ids in enumerate(prompts)]))
        for i in range(len(prompts[0]))
    ]
    peer.close()
    return torch.from_numpy(np.stack(steps, axis=1))


def logits_of_transformers(folder: Path, dtype: torch.dtype, prompts: list[list[int]]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor(prompts)).logits
    return logits.float()


def test_llama_cpp_computes_what_transformers_computes(model: PreTrainedModel, save: Save) -> None:
    pytest.importorskip("llama_cpp", reason="it compiles for minutes, so only the extra `peers` has it")
    prompts = Workload(4, 40, 1, model.config.vocab_size).prompts(seed=3)
    folder = save(model)
    ours = logits_of_transformers(folder, torch.float32, prompts)
    theirs = logits_of_llama_cpp(folder, prompts)
    # llama.cpp keeps keys and values in float16, which sends a token to another expert now and then.
    assert (ours - theirs).abs().median() < 0.005 * ours.std()
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.97


def test_llama_cpp_rounds_no_worse_than_transformers(model: PreTrainedModel, save: Save) -> None:
    pytest.importorskip("llama_cpp", reason="it compiles for minutes, so only the extra `peers` has it")
    prompts = Workload(4, 40, 1, model.config.vocab_size).prompts(seed=3)
    folder = save(model.bfloat16())
    exact = logits_of_transformers(folder, torch.float32, prompts)
    ours = logits_of_transformers(folder, torch.bfloat16, prompts)
    theirs = logits_of_llama_cpp(folder, prompts)
    assert (theirs - exact).abs().median() < (ours - exact).abs().median()
    assert (theirs.argmax(-1) == exact.argmax(-1)).float().mean() > 0.8


def test_a_file_is_written_once_for_the_same_weights(cache: Path, save: Save) -> None:
    model = build("mixtral")
    folder = save(model)
    file = gguf_file.of(folder)
    written = file.stat().st_mtime_ns
    assert gguf_file.of(folder) == file
    assert file.stat().st_mtime_ns == written
    weights = folder / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    assert gguf_file.of(folder) != file
    assert len(list(cache.iterdir())) == 2


def test_a_file_that_failed_is_not_there(cache: Path, save: Save) -> None:
    folder = save(build("mixtral"))
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | {"model.novelty.weight": torch.ones(3)}, weights)
    with pytest.raises(UnavailableError, match="novelty"):
        gguf_file.of(folder)
    assert not list(cache.iterdir())


def test_a_disk_without_room_is_noticed(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(build("mixtral"))
    monkeypatch.setattr(gguf_file, "weight_bytes", lambda _: 1 << 60)
    with pytest.raises(UnavailableError, match="disk"):
        gguf_file.of(folder)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnavailableError, match="pip install gguf"):
        gguf_file.of(fiddler.DEMO)


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("deepseek_v3", {}, "deepseek_v3"),
        ("mixtral", {"sliding_window": 16}, "sliding_window None only, not 16"),
        ("mixtral", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    ],
)
def test_what_llama_cpp_would_read_differently_is_refused(
    architecture: str, changes: dict[str, Any], reason: str, save: Save
) -> None:
    folder = save(build(architecture))
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(UnavailableError, match=reason):
        gguf_file.of(folder)
