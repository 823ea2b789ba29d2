"""Tiny random checkpoints on disk, with a tokenizer and a chat template: what a user's folder looks like."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CONTEXT = 512
N_EXPERTS = 8
TOP_K = 2
N_LAYERS = 3

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": CONTEXT,
}
# How the experts lie in the file: a tensor each, fused, or fused with biases and interleaved.
_CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "mixtral": MixtralConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "olmoe": OlmoeConfig,
    "gpt_oss": GptOssConfig,
}
_SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"head_dim": 16, "intermediate_size": 32, "num_local_experts": N_EXPERTS, "sliding_window": None},
    "qwen3_moe": {
        "head_dim": 16,
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
        "num_experts": N_EXPERTS,
    },
    "olmoe": {"intermediate_size": 32, "num_experts": N_EXPERTS, "eos_token_id": None, "pad_token_id": None},
    "gpt_oss": {
        "head_dim": 16,
        "intermediate_size": 32,
        "num_local_experts": N_EXPERTS,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "eos_token_id": None,
        "pad_token_id": None,
    },
}


def save_tiny(
    folder: Path,
    kind: str = "qwen3_moe",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: bool = True,
    max_shard_size: str = "50GB",
    **config: Any,
) -> Path:
    """Write a tiny random checkpoint of `kind` into `folder` and return the folder; the same for the same seed.

    Its experts are `N_EXPERTS` of which a token visits `TOP_K`, in each of `N_LAYERS` layers; `config` changes
    that. No token ends a text: completions run to their length unless `generation_config.json` is changed.
    """
    text = tiny_tokenizer()
    sizes = {**_COMMON, **_SIZES[kind], "vocab_size": len(text), **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_CONFIGS[kind](**sizes))
        for parameter in model.parameters():
            if parameter.dim() > 1:  # the usual initialisation leaves all tokens nearly equally likely
                torch.nn.init.normal_(parameter, std=1.2 / math.sqrt(sizes["hidden_size"]))
    model.generation_config.eos_token_id = None
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        text.save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a byte, with a chat template."""
    alphabet = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
