"""What a transformers checkpoint becomes for llama.cpp: the values that describe the model, and its tensors.

Tensors are named by gguf's tensor name map. llama.cpp has norms and routers in float32, all experts of a layer in
one tensor and, for Mixtral, whose architecture it calls llama, the rows that rotary embedding turns together side
by side.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from bench.workload import UnavailableError

ARCHITECTURES = {"qwen3_moe": "QWEN3MOE", "mixtral": "LLAMA"}
"""gguf's `MODEL_ARCH` by transformers' model type."""
PAIRED = ("mixtral",)
"""Models whose rotary embedding llama.cpp turns as neighbouring pairs, where transformers turns two halves."""
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the GGUF file."""

    name: str
    sources: tuple[str, ...]
    """Tensors of the checkpoint; several are stacked in this order."""
    is_float32: bool = False
    """Kept in float32 even where it is a matrix; vectors always are."""
    n_paired_heads: int = 0
    """Above 0: rows of so many heads, whose two halves become neighbouring pairs."""


def check(config: PreTrainedConfig) -> None:
    """Raise `UnavailableError` where llama.cpp does not know the model, or would read it differently."""
    if config.model_type not in ARCHITECTURES:
        raise UnavailableError(
            f"the GGUF writer does not know {config.model_type}: {', '.join(ARCHITECTURES)} only"
        )
    expected = {
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "sliding_window": None,
        "quantization_config": None,
    }
    for name, value in expected.items():
        found = getattr(config, name, value)
        if found != value:
            raise UnavailableError(f"the GGUF writer knows {name} {value} only, not {found}")
    if config.rope_parameters["rope_type"] != "default":
        raise UnavailableError(f"the GGUF writer does not know RoPE of type {config.rope_parameters['rope_type']}")


def add_values(writer: Any, config: Any) -> None:
    """Give a `gguf.GGUFWriter` all that llama.cpp asks of a model of this configuration."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")  # tokens are made up: only their number matters


def targets(names: Iterable[str], config: Any, name_map: Any) -> list[Target]:
    """Return what to write for the checkpoint's tensors `names`, by gguf's `TensorNameMap`.

    Raises `UnavailableError` for a tensor that llama.cpp has no name for.
    """
    merged: dict[str, dict[int, str]] = {}
    for name in names:
        expert = _EXPERT.fullmatch(name)
        group, number = (f"{expert[1]}.{expert[3]}", int(expert[2])) if expert else (name, 0)
        merged.setdefault(group, {})[number] = name
    if config.tie_word_embeddings:
        merged.pop("lm_head.weight", None)
    return [_target(group, sources, config, name_map) for group, sources in merged.items()]


def _target(group: str, sources: dict[int, str], config: Any, name_map: Any) -> Target:
    name = name_map.get_name(group, try_suffixes=(".weight",))
    if name is None:
        raise UnavailableError(f"the GGUF writer does not know the tensor {group}")
    return Target(
        name,
        tuple(sources[number] for number in sorted(sources)),
        is_float32=name.endswith(".ffn_gate_inp.weight"),
        n_paired_heads=_paired_heads(name, config),
    )


def _paired_heads(name: str, config: Any) -> int:
    if config.model_type not in PAIRED:
        return 0
    if name.endswith(".attn_q.weight"):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if name.endswith(".attn_k.weight") else 0
