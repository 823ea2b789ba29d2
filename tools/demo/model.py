"""The architecture of the demo checkpoint, and how it is written."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

# The configuration allows for twice the longest windows that the training reads.
POSITIONS = 2048
TRAINED_CONTEXT = 1024


def build(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Return an untrained model; its sizes fill the 12 MB that the checkpoint may take."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        intermediate_size=128,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=POSITIONS,
        rope_theta=10000.0,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3MoeForCausalLM(config)


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16 with the settings that its chat needs."""
    stored = copy.deepcopy(model).to(torch.bfloat16)
    stored.generation_config = GenerationConfig(
        # A document ends with the padding token, a chat turn with the end-of-turn token.
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=256,
        # Greedy, so small a model falls into loops.
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
    )
    stored.save_pretrained(folder)
    # The weights are written readable by their owner only, which would not survive being installed.
    (folder / "model.safetensors").chmod(0o644)
