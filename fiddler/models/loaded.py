"""A model ready to run: its dense part, its experts' weights, and whether its sequences share a forward."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from fiddler.config import EngineConfig, Resolved, resolve
from fiddler.devices.formula import DTYPES, ExpertFormula
from fiddler.errors import CheckpointError, UnsupportedModelError
from fiddler.models import attention, seam
from fiddler.models.alone import alone
from fiddler.models.generation import check_folder, vocabulary
from fiddler.models.naming import expert_layout
from fiddler.models.opening import open_checkpoint
from fiddler.models.packing import PACKED, check_runs, dry_step, why_apart
from fiddler.models.rotary import Rotary, find_rotary
from fiddler.models.skeleton import load_skeleton, set_attention
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.folder import find_checkpoint
from fiddler.store.mapped import Layout, MappedStore
from fiddler.text.tokenizer import Text
from fiddler.types import ExpertWeights

if TYPE_CHECKING:
    from fiddler.store.blocks import BlockStore


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and its experts; nothing in it knows about requests."""

    model: PreTrainedModel
    experts: Mapping[str, seam.ExpertsModule]
    """The experts modules by path, in layer order."""
    formulas: tuple[ExpertFormula, ...]
    """Formulas by layer."""
    n_experts: tuple[int, ...]
    """Number of experts by layer."""
    weights: Callable[[int, int], ExpertWeights]
    """(layer, expert) to its weights."""
    dtype: torch.dtype
    """Dtype of the rows that visit experts."""


@dataclass(frozen=True, slots=True)
class ServableModel(LoadedModel):
    """A model loaded from a checkpoint, with all the engine needs."""

    store: "MappedStore | BlockStore"
    top_k: int
    """Experts a token visits in a layer."""
    text: Text
    resolved: Resolved
    packed: bool
    """Whether the rows of all sequences travel in one forward; otherwise each sequence has its own."""
    rotary: Rotary | None = None
    """Embeddings that depend on the length of a sequence, if there are any."""


def load(model: str | Path, options: EngineConfig, *, packed: bool = True) -> ServableModel:
    """Load a checkpoint folder, a GGUF file or a hub id; opening reads no expert, unless the store is packed.

    `packed=False` keeps transformers' own attention and cache, for use under plain transformers, where no slots are
    filled and `device="auto"` is the CPU. Raises `ModelError`, and `ConfigError` for options the model or the
    machine cannot meet.
    """
    folder = find_checkpoint(model)
    config, checkpoint = open_checkpoint(folder, trust_remote_code=options.trust_remote_code)
    if packed:
        check_folder(folder, vocabulary(config))
    resolved = resolve(
        options,
        checkpoint_dtype=checkpoint_dtype(config, checkpoint),
        model_context=model_context(config),
        has_cuda=torch.cuda.is_available() and (packed or options.device == "cuda"),
    )
    dtype = DTYPES[resolved.dtype]
    skeleton = load_skeleton(checkpoint, config, dtype=dtype, trust_remote_code=options.trust_remote_code)
    refuse_visits(config, skeleton)
    served, packed = packed, packed and _pack(skeleton)
    experts = _of_text(skeleton, seam.find_experts(skeleton), packed=packed)
    layout = expert_layout(skeleton, experts, checkpoint)
    store = _store(checkpoint, layout, dtype, resolved, options.expert_dtype)
    checkpoint.check()  # what was read until now is what the headers say
    with alone():
        text = Text.open(folder, trust_remote_code=options.trust_remote_code)
    return ServableModel(
        model=skeleton,
        experts=experts,
        formulas=tuple(seam.formula(module, halves=checkpoint.is_gguf) for module in experts.values()),
        n_experts=layout.n_experts,
        weights=store.weights,
        dtype=dtype,
        store=store,
        top_k=experts_per_token(config),
        text=text,
        resolved=resolved,
        packed=packed,
        rotary=find_rotary(skeleton, resolved.longest) if served else None,
    )


def _store(
    checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype, resolved: Resolved, expert_dtype: str
) -> "MappedStore | BlockStore":
    if resolved.store == "mapped":
        return MappedStore(checkpoint, layout, dtype)
    from fiddler.store.blocks import BlockStore  # only what copies experts needs blocks

    if expert_dtype == "checkpoint":
        return BlockStore(checkpoint, layout, dtype)
    from fiddler.formats.quantise import converted  # which few need

    return BlockStore(checkpoint, layout, dtype, convert=partial(converted, to=expert_dtype, dtype=dtype))


def refuse_visits(config: PretrainedConfig, skeleton: PreTrainedModel) -> None:
    """Raise `CheckpointError` where a token would visit more experts than a layer has, or fewer than none."""
    top_k = experts_per_token(config)
    n_experts = max(module._shapes["down_proj"][0] for module in seam.find_experts(skeleton).values())
    if not 0 < top_k <= n_experts:
        raise CheckpointError(
            f"config.json sends each token to {top_k} experts of a layer that has {n_experts}; "
            "download the checkpoint again"
        )


def _pack(skeleton: PreTrainedModel) -> bool:
    """Give a model our attention where its sequences may share forwards; returns whether they may.

    Raises `UnsupportedModelError` for a model that transformers cannot run either.
    """
    seam.bind(seam.find_experts(skeleton), lambda *_: torch.empty(0))
    reason = ""
    if skeleton.config.get_text_config().model_type in PACKED:
        plain = set_attention(skeleton, attention.NAME)
        if not (reason := why_apart(skeleton)):
            return True
        set_attention(skeleton, plain)
    check_runs(skeleton, reason)
    return False


def seems_packed(skeleton: PreTrainedModel) -> bool:
    """Whether sequences of a model may share forwards, as far as can be told without weights; sets our seams."""
    if skeleton.config.get_text_config().model_type not in PACKED:
        return False
    seam.bind(seam.find_experts(skeleton), lambda *_: torch.empty(0))
    skeleton.set_experts_implementation(seam.NAME)
    set_attention(skeleton, attention.NAME)
    return not why_apart(skeleton)


def _of_text(
    skeleton: PreTrainedModel, experts: Mapping[str, seam.ExpertsModule], *, packed: bool
) -> Mapping[str, seam.ExpertsModule]:
    """Return the experts modules that a text's tokens visit: images have experts of their own, in towers or beside.

    If all paths are alike but for numbers, all are returned.
    """
    if len({re.sub(r"\d+", "*", path) for path in experts}) == 1:
        return experts
    seam.bind(experts, lambda *_: torch.empty(0))
    with torch.inference_mode():
        visited = dry_step(skeleton, 1, packed=packed).layers
    paths = list(experts)
    return {paths[layer]: experts[paths[layer]] for layer in sorted(visited)}


def adopt(model: PreTrainedModel) -> LoadedModel:
    """Put the seam under a model that transformers has loaded; its weights stay where they are.

    Raises `UnsupportedModelError` for a model without the seam.
    """
    experts = seam.find_experts(model)
    if not experts:
        raise UnsupportedModelError(
            f"{model.config.model_type!r} has no experts behind transformers' experts registry"
        )
    model.set_experts_implementation(seam.NAME)
    modules = list(experts.values())
    return LoadedModel(
        model=model,
        experts=experts,
        formulas=tuple(seam.formula(module) for module in modules),
        n_experts=tuple(module.down_proj.shape[0] for module in modules),
        weights=lambda layer, expert: seam.module_weights(modules[layer], expert),
        dtype=modules[0].down_proj.dtype,
    )


def checkpoint_dtype(config: PretrainedConfig, checkpoint: Checkpoint) -> str:
    """Return the dtype a checkpoint is meant to be computed in, as `EngineConfig.dtype` names it."""
    dtype = config.dtype or config.get_text_config().dtype
    if dtype is not None:
        return str(dtype).removeprefix("torch.")
    sizes: dict[str, int] = {}
    for entry in checkpoint.headers.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    most = max(sizes, key=sizes.__getitem__, default="F32")
    if len(checkpoint.headers) != len(checkpoint.entries):  # quantised
        most = "BF16"
    return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(most, most)


def experts_per_token(config: PretrainedConfig) -> int:
    """Return how many experts a token visits in a layer; 1 where the configuration does not say."""
    text = config.get_text_config()
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k", "moe_top_k")
    found = (getattr(text, name, None) for name in names)
    return next((max(k) if isinstance(k, list) else int(k) for k in found if k), 1)


def model_context(config: PretrainedConfig) -> int:
    """Return the longest context a model was made for, in tokens; about a million where it does not say.

    Dynamic NTK begins where `max_position_embeddings` ends, and reaches `factor` times as far. Raises
    `CheckpointError` where their product is no length.
    """
    text = config.get_text_config()
    given = getattr(text, "max_position_embeddings", None)
    factors = _stretches(getattr(text, "rope_parameters", None) or {})
    try:
        n_tokens = int((1 << 20 if given is None else given) * min(map(float, factors), default=1))
    except (TypeError, ValueError, OverflowError):
        n_tokens = 0
    if n_tokens < 1:
        stretched = f", stretched by {factors}" if factors else ""
        raise CheckpointError(
            f"config.json says max_position_embeddings={given}{stretched}, which is no length; correct it"
        )
    return n_tokens


def _stretches(parameters: Mapping[str, Any]) -> list[Any]:
    """Return by how much dynamic NTK stretches a context; several where layer types have their own parameters."""
    kinds: list[Mapping[str, Any]] = [kind for kind in parameters.values() if isinstance(kind, dict)]
    kinds = kinds or [parameters]
    return [kind.get("factor") or 1 for kind in kinds if kind.get("rope_type") == "dynamic"]
