"""The configuration that a GGUF file's metadata make, by transformers' own tables of their names.

Its function for a whole file takes ten seconds for the words of a vocabulary, and leaves out the width of an expert
and how positions are stretched: only its tables are used, with `_BESIDE` and `_stretched`.
"""

from collections.abc import Mapping
from math import inf
from typing import Any

import transformers
from transformers import PretrainedConfig

from fiddler.errors import CheckpointError, ModelError, UnsupportedModelError
from fiddler.given import real_number, shown
from fiddler.models.skeleton import refuse_endless
from fiddler.store.gguf_files import GgufCheckpoint

NEEDED = (5, 23)
"""The first version of transformers whose tables of GGUF were tried."""

ARCHITECTURES = {
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "qwen35moe": "qwen3_5_moe_text",
    "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2",
}
"""llama.cpp's names of what transformers' GGUF loader and Fiddler both know, to transformers' model types."""

_BESIDE = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
}
"""Names that transformers' tables lack for some architectures."""
_REQUIRED = (
    *("block_count", "context_length", "embedding_length", "expert_count", "expert_used_count"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon", "rope.freq_base"),
)
_STRETCHES = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_ENDS = ("eos", "eot", "eom")
"""Tokens that end a text, a turn and a message."""


def refuse_unknown(checkpoint: GgufCheckpoint) -> str:
    """Return the file's architecture. Raises `UnsupportedModelError` for one that is not run from GGUF."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < NEEDED:
        raise UnsupportedModelError(
            f"GGUF files need transformers {'.'.join(map(str, NEEDED))} or later, not {transformers.__version__}"
        )
    architecture = checkpoint.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{checkpoint.folder} is of architecture {shown(architecture)}, and of GGUF files Fiddler runs "
            f"{', '.join(ARCHITECTURES)}; give the safetensors version of the model"
        )
    return str(architecture)


def gguf_config(checkpoint: GgufCheckpoint) -> PretrainedConfig:
    """Return a file's configuration.

    Raises `CheckpointError` where values are missing or impossible, `UnsupportedModelError` for an architecture
    that is not run, or positions that are stretched in a way transformers has no name for.
    """
    architecture = refuse_unknown(checkpoint)
    kind = ARCHITECTURES[architecture]
    for key in _REQUIRED:
        _refuse_impossible(checkpoint, f"{architecture}.{key}", checkpoint.metadata.get(f"{architecture}.{key}"))
    refuse_endless({"num_hidden_layers": checkpoint.metadata[f"{architecture}.block_count"]}, checkpoint.folder)
    try:
        values = _values(checkpoint, architecture) | _of_file(checkpoint)
        cls: Any = transformers.CONFIG_MAPPING[kind]
        if (stretched := _stretched(checkpoint, architecture, cls())) is not None:
            theta = checkpoint.metadata[f"{architecture}.rope.freq_base"]
            values["rope_parameters"] = {**values.get("rope_parameters", {}), **stretched, "rope_theta": theta}
        config: PretrainedConfig = cls(**values)
    except ModelError:
        raise
    except Exception as error:
        raise CheckpointError(f"the metadata of {checkpoint.folder} describe no {kind} model: {error}") from error
    return config


def _refuse_impossible(checkpoint: GgufCheckpoint, key: str, value: Any) -> None:
    number = None if isinstance(value, bool) else real_number(value)
    if number is None or not 0 < number < inf:
        raise CheckpointError(f"{checkpoint.folder} says {key}={shown(value)}, which cannot be; download it again")


def _values(checkpoint: GgufCheckpoint, architecture: str) -> dict[str, Any]:
    """Return the values that transformers' tables name."""
    from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

    if architecture in GGUF_CONFIG_ARCHS:
        made: dict[str, Any] = GGUF_CONFIG_ARCHS[architecture](dict(checkpoint.metadata), tuple(checkpoint.headers))
        return made
    kind = ARCHITECTURES[architecture]
    tables: Mapping[str, Any] = GGUF_CONFIG_MAPPING
    table = {**_BESIDE, **tables[kind]}
    said = {key.removeprefix(f"{architecture}."): value for key, value in checkpoint.metadata.items()}
    known = {name: said[key] for key, name in table.items() if name and key in said}
    return {**GGUF_CONFIG_DEFAULTS_MAPPING.get(kind, {}), **known}


def _of_file(checkpoint: GgufCheckpoint) -> dict[str, Any]:
    """Return the values that are the same for every architecture."""
    ends = [checkpoint.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS]
    words = checkpoint.described.get("token_embd.weight")
    if words is None:
        raise CheckpointError(f"{checkpoint.folder} has no token_embd.weight; download it again")
    n_words = checkpoint.metadata.get("tokenizer.ggml.tokens", 0)
    if not isinstance(n_words, int) or n_words > words.shape[0]:
        raise CheckpointError(
            f"{checkpoint.folder} has {shown(n_words)} tokens, and token_embd.weight {words.shape[0]} rows; "
            "download it again"
        )
    return {
        "vocab_size": words.shape[0],
        "tie_word_embeddings": "output.weight" not in checkpoint.described,
        "bos_token_id": checkpoint.metadata.get("tokenizer.ggml.bos_token_id"),
        "pad_token_id": checkpoint.metadata.get("tokenizer.ggml.padding_token_id"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)) or None,
        "dtype": _dtype({tensor.kind for tensor in checkpoint.described.values()}),
    }


def _dtype(kinds: set[str]) -> str:
    """Return the dtype that a file of these types is computed in; vectors and routers are always F32."""
    others = kinds - {"F32", "F64"}
    return "bfloat16" if others - {"F16"} else "float16" if others else "float32"


def _stretched(checkpoint: GgufCheckpoint, architecture: str, usual: PretrainedConfig) -> dict[str, Any] | None:
    """Return how positions are stretched beyond the context of training; `None` where the file does not say.

    What llama.cpp has no name for stays as it is `usual`.
    """
    prefix = f"{architecture}.rope.scaling."
    stated = {
        key.removeprefix(prefix): value for key, value in checkpoint.metadata.items() if key.startswith(prefix)
    }
    stated.pop("finetuned", None)
    kind = stated.pop("type", None)
    if kind == "none" or not (stated or kind):
        return {"rope_type": "default"} if "factor" in (usual.rope_parameters or {}) else None
    unknown = [key for key in stated if key not in _STRETCHES]
    if kind not in ("yarn", "linear") or unknown:
        raise UnsupportedModelError(
            f"rope.scaling of type {shown(kind)} {', '.join(unknown)} is not read from GGUF files; give the "
            "safetensors version of the model"
        )
    for key, value in stated.items():
        _refuse_impossible(checkpoint, prefix + key, value)
    base = usual.rope_parameters if usual.rope_parameters.get("rope_type") == kind else {}
    return {**base, "rope_type": kind, **{_STRETCHES[key]: value for key, value in stated.items()}}
