"""A tiny config from an architecture's default config: rules by attribute name, then what overrides them."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .overrides import HEAD_DIM, HEADS, MULTIMODAL_OVERRIDES, OVERRIDES, VOCABULARY, WINDOW
from .variations import vary

HIDDEN = 64
EXPERTS = 8
TOP_K = 2
LAYERS = 4

# What the config calls a layer with routed experts in its per-layer lists.
SPARSE = frozenset({"sparse", "moe", "hash_moe"})

TOKEN_KEYS = ("_token_id", "_token_index")

Rule = Callable[[Any], Any]


def _at_most(limit: float) -> Rule:
    """A size: None and 0 mean "switched off" and stay."""

    def shrink(default: Any) -> Any:
        if isinstance(default, list):
            return [shrink(one) for one in default]
        return min(default, limit) if default else default

    return shrink


def _always(value: Any) -> Rule:
    return lambda default: value


def _group_count(default: int | None) -> int | None:
    return 4 if default and default > 1 else default


RULES: dict[str, Rule] = {
    "vocab_size": _always(VOCABULARY),
    "hidden_size": _always(HIDDEN),
    "intermediate_size": _at_most(96),
    "num_attention_heads": _always(HEADS),
    "head_dim": _at_most(HEAD_DIM),
    # Dense and shared MLPs differ in width from the experts, so that swapping two of them cannot go unseen.
    "dense_intermediate_size": _at_most(80),
    "moe_hidden_size": _at_most(56),
    "moe_intermediate_size": _at_most(48),
    "shared_intermediate_size": _at_most(40),
    "shared_expert_intermediate_size": _at_most(40),
    "shared_experts_intermediate_size": _at_most(40),
    "moe_shared_expert_intermediate_size": _at_most(40),
    # Experts.
    "num_experts": _always(EXPERTS),
    "num_local_experts": _always(EXPERTS),
    "n_routed_experts": _always(EXPERTS),
    "moe_num_experts": _always(EXPERTS),
    "num_experts_per_tok": _always(TOP_K),
    "num_experts_per_token": _always(TOP_K),
    "top_k_experts": _always(TOP_K),
    "moe_k": _always(TOP_K),
    "moe_topk": _always(TOP_K),
    "n_group": _group_count,
    "num_expert_group": _group_count,
    "topk_group": _at_most(2),
    "router_hidden_size": _at_most(24),
    "router_jitter_noise": _always(0.0),
    "input_jitter_noise": _always(0.0),
    "num_dense_layers": _at_most(1),
    "first_k_dense_replace": _at_most(1),
    # The default attends so sharply that it magnifies rounding.
    "attention_multiplier": _at_most(0.25),
    # Latent attention.
    "q_lora_rank": _at_most(32),
    "kv_lora_rank": _at_most(24),
    "qk_rope_head_dim": _at_most(8),
    "qk_nope_head_dim": _at_most(16),
    "v_head_dim": _at_most(12),
    "o_lora_rank": _at_most(16),
    "o_groups": _at_most(2),
    # Windows and indexers, small enough for a prompt of 30 tokens to cross them.
    "sliding_window": _at_most(WINDOW),
    "sliding_window_size": _at_most(WINDOW),
    "rel_extent": _at_most(24),
    "index_topk": _at_most(WINDOW),
    "index_topk_blocks": _at_most(2),
    "index_block_size": _at_most(4),
    # Fewer heads often give two tokens the score 0 exactly, and then the choice between them is arbitrary.
    "index_n_heads": _at_most(16),
    "index_head_dim": _at_most(16),
    # Linear attention and state spaces.
    "linear_num_heads": _at_most(4),
    "linear_head_dim": _at_most(16),
    "linear_num_key_heads": _at_most(2),
    "linear_num_value_heads": _at_most(4),
    "linear_key_head_dim": _at_most(16),
    "linear_value_head_dim": _at_most(16),
    "mamba_d_state": _at_most(8),
    "ssm_state_size": _at_most(8),
    "mamba_dt_rank": _at_most(4),
    "mamba_n_heads": _always(8),
    "mamba_num_heads": _always(8),
    "mamba_d_head": _always(16),
    "mamba_head_dim": _always(16),
    "n_groups": _at_most(2),
    "mamba_chunk_size": _at_most(8),
    "chunk_size": _at_most(8),
    "block_size": _at_most(8),
    # Multi-token prediction.
    "num_nextn_predict_layers": _at_most(0),
    "num_mtp_layers": _at_most(0),
}


TOWER_RULES: dict[str, Rule] = {
    "depth": _at_most(2),
    "num_hidden_layers": _at_most(2),
    "encoder_layers": _at_most(2),
    "n_layers": _at_most(2),
    "hidden_size": _at_most(32),
    "d_model": _at_most(32),
    "adapter_in_dim": _at_most(32),
    "adapter_input_size": _at_most(32),
    "intermediate_size": _at_most(48),
    "encoder_ffn_dim": _at_most(48),
    "num_attention_heads": _at_most(2),
    "num_key_value_heads": _at_most(2),
    "encoder_attention_heads": _at_most(2),
    "num_heads": _at_most(2),
    "head_dim": _at_most(16),
    # Their output is text's input.
    "out_hidden_size": _always(HIDDEN),
    "output_dim": _always(HIDDEN),
    "text_hidden_size": _always(HIDDEN),
    "adapter_out_dim": _always(HIDDEN),
}


def tiny_config(package: str, model_class: type[PreTrainedModel], *, varied: bool = False) -> PreTrainedConfig:
    """The tiny config of a package's text model or multimodal model; attention and experts run eagerly."""
    config_class = model_class.config_class
    assert config_class is not None
    if "text_config" in config_class.sub_configs:
        config = _multimodal(package, config_class, varied=varied)
    else:
        config = config_class(**_text(package, config_class().to_dict(), varied=varied))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def _text(package: str, attributes: dict[str, Any], *, varied: bool) -> dict[str, Any]:
    values = {key: rule(attributes[key]) for key, rule in RULES.items() if key in attributes}
    values |= _key_value_heads(attributes) | _latent_head_dim(attributes, values)
    values |= _special_tokens(attributes) | _layers(attributes)
    values |= deepcopy(OVERRIDES.get(package, {}))
    return vary(package, attributes, values) if varied else values


def _multimodal(package: str, config_class: type[PreTrainedConfig], *, varied: bool) -> PreTrainedConfig:
    """A text config, and towers that are never run: only their weights must be there."""
    default = config_class()
    values: dict[str, Any] = _special_tokens(default.to_dict())
    for name, part_class in config_class.sub_configs.items():
        part = getattr(default, name) or part_class()
        attributes = {"model_type": part.model_type} | part.to_dict()
        if name == "text_config":
            values[name] = {"model_type": part.model_type} | _text(package, attributes, varied=varied)
        else:
            values[name] = _tower(attributes)
    return config_class(**_merged(values, deepcopy(MULTIMODAL_OVERRIDES.get(package, {}))))


def _tower(attributes: dict[str, Any]) -> dict[str, Any]:
    """What sees or hears, with its own towers."""
    tiny = {key: rule(attributes[key]) for key, rule in TOWER_RULES.items() if key in attributes}
    for key, value in attributes.items():
        if isinstance(value, dict) and "model_type" in value:
            tiny[key] = _tower(value)
        elif isinstance(value, list) and len(value) == attributes.get("num_hidden_layers"):
            tiny[key] = value[: tiny["num_hidden_layers"]]
    return {"model_type": attributes["model_type"]} | tiny


def _merged(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides reach into nested configs."""
    for key, value in overrides.items():
        values[key] = _merged(values[key], value) if isinstance(value, dict) and key in values else value
    return values


def _key_value_heads(attributes: dict[str, Any]) -> dict[str, int]:
    """Keep multi-head, grouped and multi-query attention what they are."""
    heads, shared = attributes.get("num_attention_heads"), attributes.get("num_key_value_heads")
    if shared is None:
        return {}
    return {"num_key_value_heads": HEADS if shared == heads else min(shared, 2)}


def _latent_head_dim(attributes: dict[str, Any], tiny: dict[str, Any]) -> dict[str, int]:
    """With latent attention `head_dim` names the rotated part of a head, or all of it."""
    rope, nope = "qk_rope_head_dim", "qk_nope_head_dim"
    if attributes.get("head_dim") is None or rope not in attributes:
        return {}
    if attributes["head_dim"] == attributes[rope]:
        return {"head_dim": tiny[rope]}
    return {"head_dim": tiny[rope] + tiny[nope]} if nope in attributes else {}


def _special_tokens(attributes: dict[str, Any]) -> dict[str, int | None]:
    """No token ends a text; every other special token is one of the small vocabulary."""
    special = [key for key in attributes if key.endswith(TOKEN_KEYS) and attributes[key] is not None]
    tokens = {key: VOCABULARY - 1 - i for i, key in enumerate(special)}
    return tokens | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))


def _layers(attributes: dict[str, Any]) -> dict[str, Any]:
    """The number of layers, and the per-layer kinds cut down to the same few of the default layers."""
    depth = attributes.get("num_hidden_layers")
    if depth is None:
        return {}
    kinds = {
        key: value
        for key, value in attributes.items()
        if isinstance(value, list) and len(value) == depth and isinstance(value[0], str)
    }
    kept = _representatives(list(kinds.values()), depth)
    return {"num_hidden_layers": LAYERS} | {key: [value[i] for i in kept] for key, value in kinds.items()}


def _representatives(kinds: list[list[str]], depth: int) -> list[int]:
    """Layers that together have every kind the default has, then sparse ones, new mixtures first."""
    layers = list(zip(*kinds, strict=True)) if kinds else [()] * depth
    seen: set[tuple[int, str]] = set()
    kept: list[int] = []
    for i, layer in enumerate(layers):
        if new := set(enumerate(layer)) - seen:
            kept.append(i)
            seen |= new
    mixtures = {layers[i] for i in kept}
    rest = sorted(
        set(range(depth)) - set(kept),
        key=lambda i: (SPARSE.isdisjoint(layers[i]), layers[i] in mixtures, i),
    )
    return sorted(kept + rest[: LAYERS - len(kept)])
