"""Where a tiny config departs from the rules by attribute name: by architecture, with the reason."""

from typing import Any

VOCABULARY = 199
HEADS = 4
HEAD_DIM = 16
WINDOW = 8

# A quarter of a head of 32 is rotated: four frequencies, in sections for time, height and width.
SECTIONED_ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}

# The widths of a tower's convolutions.
SAM = {"output_channels": 8, "downsample_channels": [16, 32]}

OVERRIDES: dict[str, dict[str, Any]] = {
    # The default scales the logits down to near equality.
    "cohere2_moe": {"logit_scale": 1.0},
    # With the default its layers cannot be built.
    "deepseek_ocr2": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    # An eighth of the head is rotated; the default rate would leave a short prompt uncompressed.
    "deepseek_v4": {
        "head_dim": 64,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    # With the default's missing count of shared experts its layer cannot be built.
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    # The sizes of sliding layers have names of their own.
    "dots3_note": {
        "head_dim": 16,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_qk_rope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    # Text experts and vision experts differ in size.
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [48, 40],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    },
    # The default is a dense model; this is the shape of the published sparse one.
    "gemma4": {
        "enable_moe_block": True,
        "moe_intermediate_size": 48,
        "global_head_dim": 32,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    # Half of a head is rotated: four frequencies, in sections for time, height and width.
    "glm4v_moe": {
        "head_dim": HEAD_DIM,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    },
    # The default's indexer pools more than the tiny one picks.
    "glm5_next": {"index_kpool": 2},
    # The default has no shared expert, which is what this architecture adds to granitemoe.
    "granitemoe_swa": {"shared_intermediate_size": 40},
    "granitemoeshared": {"shared_intermediate_size": 40},
    # The default has no attention layer.
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    },
    # The default leaves the head size open, and so its attention cannot be built.
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    # Sliding layers' sizes have names of their own; the multiplier divides the logits down to near equality.
    "inkling": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": HEAD_DIM,
        "logits_mup_width_multiplier": 1.0,
    },
    # As above; and its head is padded beyond the tokens there are.
    "inkling2": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": HEAD_DIM,
        "unpadded_vocab_size": VOCABULARY - 5,
        "n_layers_per_attn_res_block": 2,
    },
    # The default attends in every eighth layer; here one of the two layers with experts attends.
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    # The default has only full attention, published ones mix; heads are counted per layer.
    "laguna": {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "num_attention_heads_per_layer": [HEADS, 2 * HEADS, 2 * HEADS, HEADS],
    },
    # The default has no layer types.
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    # The default has only full attention, published ones mix.
    "mellum": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    # A third of the head is rotated, and that must be an even number.
    "mimo_v2_flash": {"head_dim": 24, "v_head_dim": 16},
    # The default has no sparse attention, published ones have.
    "minimax_m3_vl": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "rotary_dim": 8,
    },
    # The default has one expert layer. A prompt's time steps are clamped from below and later ones are not.
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
        "time_step_min": 1e-6,
    },
    # The default's rotary sections are those of a larger head.
    "qwen3_5_moe": {"head_dim": 32, "rope_parameters": SECTIONED_ROPE},
    # The default has no indexer, published ones have.
    "qwen4_exp": {
        "head_dim": 32,
        "rope_parameters": SECTIONED_ROPE,
        "hc_lowrank": 8,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    # Its window is over what follows the prompt: once crossed, no unsplit forward, which is all prompt, equals it.
    "unlimited_ocr": {"sliding_window": 32},
    # Its code takes one expert a token, and needs a window for the sliding layers of published ones.
    "zaya": {
        "num_experts_per_tok": 1,
        "sliding_window": WINDOW,
        "layer_types": ["hybrid", "hybrid_sliding", "hybrid", "hybrid_sliding"],
    },
}

MULTIMODAL_OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {"vision_config": {"sam_config": SAM}},
    # A vision tower's later layers have experts too.
    "dots3_note": {
        "vision_config": {
            "mlp_layer_types": ["dense", "sparse"],
            "num_local_experts": 4,
            "moe_intermediate_size": 24,
        },
        "audio_config": {"downsample_hidden_size": 8},
    },
    # It writes this token where an image goes.
    "gemma4": {"text_config": {"pad_token_id": 0}},
    "glm5_next": {"vision_config": {"projection_intermediate_size": 48}},
    # Fewer layers than steps of its pyramid need scipy.
    "inkling": {"vision_config": {"patch_size": 4, "n_layers": 5}},
    "minimax_m3_vl": {"projector_hidden_size": 48, "merged_hidden_size": 128},
    # One size a layer.
    "muse_spark": {"audio_config": {"patch_sizes": [4, 2], "hidden_sizes": [8, 16], "depths": [1, 1]}},
    # Its code asks for a token that the default lacks.
    "qwen3_omni_moe": {"vision_start_token_id": VOCABULARY - 9, "audio_config": {"downsample_hidden_size": 8}},
    "unlimited_ocr": {"vision_config": {"sam_config": SAM}},
}
