"""Tiny GGUF files as llama.cpp's converter writes them, each beside a twin: the same numbers in float32.

Names and changes of values are written down here once more, from `conversion/` of ggml-org/llama.cpp.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fiddler.formats import ggml
from fiddler.formats.packed import Code
from tests.formats.blocks import FLOATS, blocks
from tests.formats.folders import Pair
from tests.support.tiny import CONTEXT, N_EXPERTS, SPECIAL, TEMPLATE, TOP_K, tiny_tokenizer

HIDDEN = 256
N_LAYERS = 2
WORDS = (*tiny_tokenizer().convert_ids_to_tokens(range(len(tiny_tokenizer()))), "th", "the")
"""One word a byte, and two that merges make."""

_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": CONTEXT,
    "vocab_size": len(WORDS),
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "mlp.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
}
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True)
class Kind:
    """An architecture: transformers' model type and sizes, and what its converter does."""

    model_type: str
    config: Mapping[str, Any]
    metadata: Mapping[str, Any]
    post_norm: str = "ffn_norm"
    changed: Callable[[str, Tensor, Any], Tensor] = field(default=lambda name, tensor, config: tensor)


def _qwen35(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Norms about zero get one added; value heads go from groups of a key head each to turns."""
    if name.endswith("A_log"):
        tensor = -tensor.exp()
    if name.endswith("norm.weight") and "linear_attn" not in name:
        return tensor + 1
    n_keys, per_key = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    if not re.search(r"A_log|dt_bias|in_proj|conv1d|out_proj", name):
        return tensor
    if name.endswith("conv1d.weight"):
        tensor = tensor.squeeze(1)
    if name.endswith("out_proj.weight"):
        return tensor.unflatten(1, (n_keys, per_key, -1)).transpose(1, 2).flatten(1)
    first = 2 * n_keys * config.linear_key_head_dim if re.search("in_proj_qkv|conv1d", name) else 0
    turned = tensor[first:].unflatten(0, (n_keys, per_key, -1)).transpose(0, 1).flatten(0, 2)
    return torch.cat((tensor[:first], turned))


def _qwen2(name: str, tensor: Tensor, config: Any) -> Tensor:
    return tensor.squeeze() if name.endswith("shared_expert_gate.weight") else tensor


KINDS: dict[str, Kind] = {
    "qwen3moe": Kind(
        "qwen3_moe",
        {"head_dim": 64, "moe_intermediate_size": 256, "num_experts": N_EXPERTS, "norm_topk_prob": True},
        {"expert_feed_forward_length": 256, "attention.key_length": 64, "feed_forward_length": 6144},
    ),
    "qwen2moe": Kind(
        "qwen2_moe",
        {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 320, "num_experts": N_EXPERTS},
        {"expert_feed_forward_length": 256, "expert_shared_feed_forward_length": 320},
        changed=_qwen2,
    ),
    "gpt-oss": Kind(
        "gpt_oss",
        {
            "head_dim": 64,
            "intermediate_size": 256,
            "num_local_experts": N_EXPERTS,
            "sliding_window": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
        {
            "feed_forward_length": 256,
            "expert_feed_forward_length": 256,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "attention.sliding_window": 8,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 8.0,
            "rope.scaling.original_context_length": 64,
        },
        "post_attention_norm",
    ),
    "minimax-m2": Kind(
        "minimax_m2",
        {"head_dim": 64, "intermediate_size": 256, "num_local_experts": N_EXPERTS, "rotary_dim": 32},
        {
            "feed_forward_length": 256,
            "expert_feed_forward_length": 256,
            "attention.key_length": 64,
            "rope.dimension_count": 32,
            "expert_gating_func": 2,
        },
    ),
    "qwen35moe": Kind(
        "qwen3_5_moe_text",
        {
            "head_dim": 64,
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 320,
            "num_experts": N_EXPERTS,
            "full_attention_interval": 2,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_value_head_dim": 64,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
            },
        },
        {
            "expert_feed_forward_length": 256,
            "expert_shared_feed_forward_length": 320,
            "attention.key_length": 64,
            "full_attention_interval": 2,
            "ssm.conv_kernel": 4,
            "ssm.state_size": 32,
            "ssm.group_count": 2,
            "ssm.time_step_rank": 4,
            "ssm.inner_size": 256,
            "rope.dimension_count": 16,
            "rope.dimension_sections": [3, 3, 2, 0],
        },
        "post_attention_norm",
        _qwen35,
    ),
}
"""By llama.cpp's names."""


@dataclass
class Tensors:
    """What a file holds: values as bytes of a type, by name."""

    stored: dict[str, tuple[np.ndarray[Any, Any], gguf.GGMLQuantizationType]] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor, kind: str, seed: int = 0) -> Tensor:
        """Store a tensor as a type; returns the numbers that are stored, which for K types are not the given."""
        to = gguf.GGMLQuantizationType[kind]
        if kind in ("Q4_K", "Q5_K", "Q6_K"):
            rows = _random(Code[kind], tensor, seed)
        elif kind == "F32":
            rows = tensor.float().contiguous().numpy()
        else:
            rows = quantize(tensor.float().contiguous().numpy(), to)
        self.stored[name] = rows, to
        return torch.from_numpy(np.array(dequantize(rows, to))).view(tensor.shape)

    def join(self) -> None:
        """Put up behind gate, as newer files have them."""
        for name in [name for name in self.stored if "ffn_gate_exps" in name]:
            (gate, to), (up, _) = self.stored.pop(name), self.stored.pop(name.replace("gate", "up"))
            self.stored[name.replace("gate", "gate_up")] = np.concatenate((gate, up), axis=1), to


def _random(code: Code, like: Tensor, seed: int) -> np.ndarray[Any, Any]:
    """Return blocks of random codes, whose numbers are about as large as weights are."""
    columns = like.shape[-1]
    rows = blocks(code, (like.numel() // columns, columns), seed)
    each = rows.unflatten(1, (-1, ggml.BLOCKS[code.value].nbytes))
    for at in FLOATS[code.value]:
        scales = each[..., at : at + 2].contiguous().view(torch.float16) / 16
        each[..., at : at + 2] = scales.view(torch.uint8)
    return np.array(rows.view(*like.shape[:-1], -1).numpy())


Types = Callable[[str], str]
"""A tensor's name to its type; vectors, norms and routers are always F32."""


def of_experts(kind: str, dense: str = "F32") -> Types:
    """Return a rule that gives experts one type, and the rest of the matrices another."""
    return lambda name: kind if "_exps.weight" in name else dense


def write_pair(
    folder: Path,
    kind: str,
    types: Types,
    *,
    tokenizer: bool = True,
    tied: bool = False,
    joined: bool = False,
    n_parts: int = 1,
    config: Mapping[str, Any] = MappingProxyType({}),
    **changes: Any,
) -> Pair:
    """Write a file of an architecture and its twin; `changes` are metadata, left out where they are `None`."""
    about = KINDS[kind]
    made = CONFIG_MAPPING[about.model_type](**{**_COMMON, **about.config, **config, "tie_word_embeddings": tied})
    around = 0.0 if kind == "qwen35moe" else 1.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
        for name, parameter in model.state_dict().items():
            if "norm" in name and parameter.dim() == 1:
                parameter.uniform_(-0.3, 0.3).add_(1.0 if "linear_attn" in name else around)
            elif parameter.dim() > 1 and "embed" not in name:
                torch.nn.init.normal_(parameter, std=1.0 / math.sqrt(HIDDEN))
            else:
                torch.nn.init.normal_(parameter, std=0.5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = Tensors()
    for name in state:
        if not (tied and name == "lm_head.weight"):
            _add(tensors, name, state, made, about, types)
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    if joined:
        tensors.join()
    model.load_state_dict(state)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "twin")
    file = folder / "tiny.gguf"
    _write(file, kind, made, tensors, about.metadata, changes, tokenizer=tokenizer, n_parts=n_parts)
    return Pair(file if n_parts == 1 else folder / f"tiny-00001-of-{n_parts:05}.gguf", folder / "twin")


def _add(tensors: Tensors, name: str, state: dict[str, Tensor], config: Any, about: Kind, types: Types) -> None:
    """Store a tensor of the model, and put what was stored in its place."""
    if ".experts." in name:
        state[name] = _add_experts(tensors, name, state[name], about, types)
        return
    known = _WHOLE.get(name) or _of_layer(name, about)
    changed = about.changed(name, state[name], config)
    always = changed.dim() == 1 or "ffn_gate_inp" in known or "conv1d" in known
    stored = tensors.add(known, changed, "F32" if always else types(known), seed=len(tensors.stored))
    if not torch.equal(stored, changed):
        assert torch.equal(about.changed(name, changed, config), changed), (
            "a value that is changed is stored as F32"
        )
        state[name] = stored


def _of_layer(name: str, about: Kind) -> str:
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    assert match is not None
    block, part = f"blk.{match[1]}.", match[2]
    if part in _PARTS:
        return block + _PARTS[part]
    stem, _, suffix = part.rpartition(".")
    return f"{block}{about.post_norm if stem == 'post_attention_layernorm' else _PARTS[stem]}.{suffix}"


def _add_experts(tensors: Tensors, name: str, tensor: Tensor, about: Kind, types: Types) -> Tensor:
    """Store gate, up or down, `[E, out, in]`, and their biases; gpt-oss has rows of gate and up in turns."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_bias)?", name)
    assert match is not None
    block, suffix = f"blk.{match[1]}.ffn_", "bias" if match[3] else "weight"
    turned = about.model_type == "gpt_oss" and not match[3]
    rows = tensor.mT if turned else tensor
    if match[2] == "down":
        stored = _stored(tensors, f"{block}down_exps.{suffix}", rows, types)
        return stored.mT if turned else stored
    taking_turns = about.model_type == "gpt_oss"
    gate, up = (rows[:, 0::2], rows[:, 1::2]) if taking_turns else rows.chunk(2, dim=1)
    gate = _stored(tensors, f"{block}gate_exps.{suffix}", gate, types)
    up = _stored(tensors, f"{block}up_exps.{suffix}", up, types)
    both = torch.stack((gate, up), dim=2).flatten(1, 2) if taking_turns else torch.cat((gate, up), dim=1)
    return both.mT if turned else both


def _stored(tensors: Tensors, name: str, tensor: Tensor, types: Types) -> Tensor:
    return tensors.add(name, tensor, "F32" if name.endswith("bias") else types(name), seed=len(tensors.stored))


def _write(
    file: Path,
    kind: str,
    config: Any,
    tensors: Tensors,
    beside: Mapping[str, Any],
    changes: Mapping[str, Any],
    *,
    tokenizer: bool,
    n_parts: int,
) -> None:
    most = -(-len(tensors.stored) // n_parts) if n_parts > 1 else 0
    writer = gguf.GGUFWriter(file, kind, split_max_tensors=most)
    stated = {
        "block_count": N_LAYERS,
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "expert_count": N_EXPERTS,
        "expert_used_count": TOP_K,
        **beside,
        **changes,
    }
    for key, value in stated.items():
        if value is not None:
            _add_value(writer, f"{kind}.{key}", value)
    if tokenizer:
        _add_tokenizer(writer)
    for name, (rows, to) in tensors.stored.items():
        writer.add_tensor(name, rows, raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_value(writer: Any, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)


def _add_tokenizer(writer: Any) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(list(WORDS))
    control = gguf.TokenType.CONTROL
    writer.add_token_types([control if word in SPECIAL else gguf.TokenType.NORMAL for word in WORDS])
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(WORDS.index("<|im_end|>"))
    writer.add_pad_token_id(WORDS.index("<|endoftext|>"))
    writer.add_chat_template(TEMPLATE)
