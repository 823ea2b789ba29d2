"""Random checkpoints with the true shapes of published models, for measurements without a download.

    python -m tools.synthesize qwen3-30b-a3b[:layers=4] FOLDER
    python -m tools.synthesize mixtral-8x7b[:layers=2] FOLDER

A few of the model's layers, each of its true size, under the tensor names of the hub. The vocabulary is cut in
proportion, so that experts, attention and output layer keep their shares of the bytes a token reads.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 2_000_000_000
STANDARD_DEVIATION = 0.02
"""Small enough that activations stay finite in bf16, and the spread a trained router starts from."""
MARKER = "synthetic.json"
"""Says what a folder was made from."""
VOCABULARY_STEP = 64
"""Published vocabularies are multiples of this or nearly; odd sizes would measure odd kernels."""

_COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,  # a random model must not stop by chance
    "hidden_act": "silu",
    "initializer_range": STANDARD_DEVIATION,
    "dtype": "bfloat16",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
}
QWEN3 = _COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "vocab_size": 151_936,
}
"""The `config.json` of Qwen/Qwen3-30B-A3B on the hub."""
MIXTRAL = _COMMON | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "vocab_size": 32_000,
}
"""The `config.json` of mistralai/Mixtral-8x7B-v0.1 on the hub."""
MODELS: dict[str, tuple[dict[str, Any], int]] = {"qwen3-30b-a3b": (QWEN3, 4), "mixtral-8x7b": (MIXTRAL, 2)}
"""By name: the published configuration, and how many layers hold at least 4 GB of experts."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One tensor to write; a vector is a norm's and holds ones."""

    name: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in bf16."""
        return 2 * math.prod(self.shape)


def config_of(spec: str, **overrides: Any) -> dict[str, Any]:
    """Return the configuration for `NAME[:layers=N]`; `overrides` replace single values. Raises `ValueError`."""
    name, n_layers = parsed(spec, MODELS)
    published, n_default = MODELS[name]
    return cut(published, n_layers or n_default) | overrides


def parsed(spec: str, names: Iterable[str]) -> tuple[str, int | None]:
    """Return the name and the layers of `NAME[:layers=N]`, where it gives them. Raises `ValueError`."""
    name, _, options = spec.partition(":")
    key, _, value = options.partition("=")
    if name not in names or (options and (key != "layers" or not value.isdigit() or int(value) == 0)):
        raise ValueError(f"{spec!r} is not NAME[:layers=N] with NAME one of {', '.join(names)}")
    return name, int(value) if value else None


def cut(published: Mapping[str, Any], n_layers: int) -> dict[str, Any]:
    """Return a configuration with so many layers, and the share of the vocabulary that belongs to them."""
    share = published["vocab_size"] * n_layers / published["num_hidden_layers"]
    vocabulary = max(1, round(share / VOCABULARY_STEP)) * VOCABULARY_STEP
    return {**published, "num_hidden_layers": n_layers, "vocab_size": vocabulary}


def tensors(config: dict[str, Any]) -> Iterator[Plan]:
    """Yield every tensor of the checkpoint in the order of the model, named as on the hub."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield Plan("model.embed_tokens.weight", (vocabulary, hidden))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for plan in (*_attention(config), *_experts(config)):
            yield Plan(prefix + plan.name, plan.shape)
    yield Plan("model.norm.weight", (hidden,))
    yield Plan("lm_head.weight", (vocabulary, hidden))


def _attention(config: dict[str, Any]) -> Iterator[Plan]:
    hidden, dim = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    yield Plan("input_layernorm.weight", (hidden,))
    yield Plan("self_attn.q_proj.weight", (queries, hidden))
    yield Plan("self_attn.k_proj.weight", (keys, hidden))
    yield Plan("self_attn.v_proj.weight", (keys, hidden))
    yield Plan("self_attn.o_proj.weight", (hidden, queries))
    if config["model_type"] == "qwen3_moe":
        yield Plan("self_attn.q_norm.weight", (dim,))
        yield Plan("self_attn.k_norm.weight", (dim,))
    yield Plan("post_attention_layernorm.weight", (hidden,))


def _experts(config: dict[str, Any]) -> Iterator[Plan]:
    hidden = config["hidden_size"]
    if config["model_type"] == "qwen3_moe":
        block, n_experts, inner = "mlp", config["num_experts"], config["moe_intermediate_size"]
        gate, up, down = "gate_proj", "up_proj", "down_proj"
    else:
        block, n_experts, inner = "block_sparse_moe", config["num_local_experts"], config["intermediate_size"]
        gate, up, down = "w1", "w3", "w2"
    yield Plan(f"{block}.gate.weight", (n_experts, hidden))
    for expert in range(n_experts):
        prefix = f"{block}.experts.{expert}."
        yield Plan(f"{prefix}{gate}.weight", (inner, hidden))
        yield Plan(f"{prefix}{up}.weight", (inner, hidden))
        yield Plan(f"{prefix}{down}.weight", (hidden, inner))


def shards(plans: Iterator[Plan], shard_bytes: int) -> Iterator[list[Plan]]:
    """Cut the tensors into files of at most `shard_bytes`, in order, as the hub's checkpoints are."""
    shard: list[Plan] = []
    n_bytes = 0
    for plan in plans:
        if shard and n_bytes + plan.nbytes > shard_bytes:
            yield shard
            shard, n_bytes = [], 0
        shard.append(plan)
        n_bytes += plan.nbytes
    yield shard


def write(config: dict[str, Any], folder: Path, *, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the checkpoint, one shard in memory at a time; a complete one of the same make is kept.

    Raises `ValueError` where the folder holds anything else.
    """
    make = {"config": config, "seed": seed, "shard_bytes": shard_bytes}
    if folder.exists():
        if _make_of(folder) == make:
            return folder
        raise ValueError(f"{folder} exists and holds something else; remove it or choose another folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_shards(list(shards(tensors(config), shard_bytes)), partial, seed)
    _write_json(partial / "config.json", config)
    _write_json(partial / MARKER, make)
    partial.rename(folder)  # the folder appears whole or not at all
    return folder


def _make_of(folder: Path) -> Any:
    try:
        return json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None


def _write_shards(files: list[list[Plan]], folder: Path, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, plans in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file({p.name: _values(p, random) for p in plans}, folder / name, metadata={"format": "pt"})
        weight_map |= {plan.name: name for plan in plans}
    total = sum(plan.nbytes for plans in files for plan in plans)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _values(plan: Plan, random: torch.Generator) -> Tensor:
    tensor = torch.empty(plan.shape, dtype=torch.bfloat16)
    if len(plan.shape) == 1:
        return tensor.fill_(1.0)
    return tensor.normal_(std=STANDARD_DEVIATION, generator=random)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.synthesize", description=__doc__.splitlines()[0])
    parser.add_argument("spec", help=f"NAME[:layers=N], NAME one of {', '.join(MODELS)}")
    parser.add_argument("folder", type=Path, help="where to write; kept if it holds this checkpoint already")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        config = config_of(options.spec)
        folder = write(config, options.folder, seed=options.seed)
    except ValueError as error:
        parser.error(str(error))
    n_bytes = sum(plan.nbytes for plan in tensors(config))
    print(f"{folder}: {config['num_hidden_layers']} layers, {n_bytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
