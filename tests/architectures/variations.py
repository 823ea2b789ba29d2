"""A second config of an architecture: as many options as go together, other than by default."""

from collections.abc import Callable
from typing import Any

from .overrides import WINDOW

Rule = Callable[[Any], Any]

SHORT_WINDOW = WINDOW - 3
SLIDING, FULL = "sliding_attention", "full_attention"

# Lengths matter to none of these: each is a rule for frequencies.
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
)


def _opposite(default: Any) -> bool:
    return not default


def _always(value: Any) -> Rule:
    return lambda default: value


RULES: dict[str, Rule] = {
    # Windows.
    "use_sliding_window": _always(True),
    "sliding_window": _always(SHORT_WINDOW),
    "sliding_window_size": _always(SHORT_WINDOW),
    "max_window_layers": _always(2),
    "sliding_window_pattern": _always(2),
    "global_attn_every_n_layers": _always(2),
    # Biases, norms and scales.
    "attention_bias": _opposite,
    "mlp_bias": _opposite,
    "qkv_bias": _opposite,
    "use_bias": _opposite,
    "lm_head_bias": _opposite,
    "use_qk_norm": _opposite,
    "clip_qkv": _always(0.5),
    "attention_multiplier": _always(0.1),
    "residual_multiplier": _always(0.5),
    "embedding_multiplier": _always(2.0),
    "logits_scaling": _always(0.5),
    "logit_scale": _always(2.0),
    "final_logit_softcapping": _always(3.0),
    "tie_word_embeddings": _opposite,
    # Routing.
    "norm_topk_prob": _opposite,
    "moe_renormalize": _opposite,
    "routed_scaling_factor": _always(0.7),
    "route_scale": _always(0.7),
}

# From these a config makes its layer types, unless they are given.
PATTERNS = frozenset({"max_window_layers", "sliding_window_pattern", "global_attn_every_n_layers"})

# What transformers itself cannot run otherwise.
UNVARIED: dict[str, tuple[str, ...]] = {
    "ernie4_5_vl_moe": ("rope_parameters",),
    "minimax": ("rope_parameters",),
    "mistral4": ("rope_parameters",),
    "mixtral": ("rope_parameters",),
    "phimoe": ("rope_parameters",),
}


def vary(package: str, attributes: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a tiny config, varied; `attributes` are the defaults beneath them."""
    known = attributes | values
    varied = values | {key: rule(known[key]) for key, rule in RULES.items() if key in known}
    types = known.get("layer_types")
    if PATTERNS & known.keys():
        varied.pop("layer_types", None)
    elif types and set(types) <= {SLIDING, FULL}:
        varied["layer_types"] = types[::-1]
    if rope := known.get("rope_parameters"):
        varied["rope_parameters"] = _rope(rope, ROPES[len(package) % len(ROPES)])
    for key in UNVARIED.get(package, ()):
        varied.pop(key, None)
        varied |= {key: values[key]} if key in values else {}
    return varied


def _rope(parameters: dict[str, Any], kind: dict[str, Any]) -> dict[str, Any]:
    """Rotate in another way; with parameters by layer type, in all of them."""
    if "rope_type" not in parameters:
        return {layer_type: _rope(part, kind) if part else part for layer_type, part in parameters.items()}
    return parameters | kind if parameters["rope_type"] == "default" else parameters
