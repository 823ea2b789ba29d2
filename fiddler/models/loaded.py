"""A model ready to run: its dense part, its experts' layout, and how it takes its rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fiddler.config import EngineConfig, Resolved, resolve
from fiddler.devices.base import DTYPES, ExpertFormula
from fiddler.errors import CheckpointError
from fiddler.models import attention, seam
from fiddler.models.naming import expert_layout
from fiddler.models.packed import PACKED
from fiddler.models.skeleton import load_skeleton, read_config
from fiddler.models.text import Text
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.host import MappedStore


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What `load` returns; nothing in it knows about requests."""

    model: PreTrainedModel
    experts: Mapping[str, nn.Module]
    formulas: tuple[ExpertFormula, ...]
    store: MappedStore
    text: Text
    resolved: Resolved
    packed: bool
    """Whether the rows of all sequences travel in one forward; otherwise each sequence has its own."""


def find_checkpoint(model: str | Path) -> Path:
    """Return the folder of a checkpoint given as a path or as a hub id.

    A hub id is looked up in the local hub cache first and downloaded otherwise. Raises `CheckpointError`.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") != 1:
        raise CheckpointError(f"{model} is neither a checkpoint folder nor a hub id (name/model)")
    files = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.py"]
    for cached in (True, False):
        try:
            return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=files, local_files_only=cached))
        except HFValidationError as error:
            raise CheckpointError(f"{model} is neither a checkpoint folder nor a hub id: {error}") from error
        except Exception as error:
            if not cached:
                reason = f"{type(error).__name__}: {error}"
                raise CheckpointError(f"{model} is not in the hub cache and cannot be downloaded: {reason}") from error
    raise AssertionError


def checkpoint_dtype(config: PretrainedConfig, checkpoint: Checkpoint) -> str:
    """Return the dtype a checkpoint is meant to be computed in, as `EngineConfig.dtype` names it."""
    dtype = config.dtype or config.get_text_config().dtype
    if dtype is None:
        names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        sizes: dict[str, int] = {}
        for entry in checkpoint.entries.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
        most = max(sizes, key=sizes.__getitem__, default="F32")
        return names.get(most, most)
    return str(dtype).removeprefix("torch.")


def model_context(config: PretrainedConfig) -> int:
    """Return the longest context a model was made for, in tokens; a generous bound where it does not say."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20)


def load(model: str | Path, options: EngineConfig, *, attention_name: str | None = attention.NAME) -> LoadedModel:
    """Load a checkpoint; opening reads no expert.

    `attention_name` replaces the packed attention, for use under plain transformers. Raises `ModelError`.
    """
    folder = find_checkpoint(model)
    config = read_config(folder, trust_remote_code=options.trust_remote_code)
    checkpoint = Checkpoint.open(folder)
    resolved = resolve(
        options, checkpoint_dtype=checkpoint_dtype(config, checkpoint), model_context=model_context(config)
    )
    packed = config.get_text_config().model_type in PACKED and attention_name == attention.NAME
    dtype = DTYPES[resolved.dtype]
    skeleton = load_skeleton(
        folder,
        config,
        dtype=dtype,
        attention=attention.NAME if packed else None,
        trust_remote_code=options.trust_remote_code,
    )
    experts = seam.find_experts(skeleton)
    layout, derived = expert_layout(skeleton, experts, checkpoint)
    return LoadedModel(
        model=skeleton,
        experts=experts,
        formulas=tuple(seam.formula(module) for module in experts.values()),
        store=MappedStore(checkpoint, layout, dtype, derived),
        text=Text.open(folder, trust_remote_code=options.trust_remote_code),
        resolved=resolved,
        packed=packed,
    )


def logits_of(model: nn.Module, keep: Tensor) -> Callable[..., Tensor]:
    """Return a forward that computes logits `[len(keep), V]` for the rows `keep` of one packed batch."""

    def run(**inputs: object) -> Tensor:
        output = model(**inputs, use_cache=True, logits_to_keep=keep)
        logits: Tensor = output.logits[0]
        return logits if logits.shape[0] == keep.shape[0] else logits[keep]

    return run


__all__ = ["LoadedModel", "find_checkpoint", "load", "logits_of", "torch"]
