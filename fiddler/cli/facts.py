"""A checkpoint's facts for `fiddler inspect`: its sizes, from configuration and headers, and this machine's memory.

No weight is read. The sizes of the dense part come from the shapes of a skeleton without weights.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from fiddler.config import EngineConfig, resolve
from fiddler.devices.formula import DTYPES
from fiddler.formats.quantised import Quantised
from fiddler.models import seam
from fiddler.models.loaded import checkpoint_dtype, model_context, refuse_visits, seems_packed
from fiddler.models.naming import expert_layout
from fiddler.models.opening import open_checkpoint
from fiddler.models.skeleton import meta_skeleton
from fiddler.store.checkpoint import EXPERT_DTYPES, Checkpoint, Entry
from fiddler.store.folder import find_checkpoint
from fiddler.store.mapped import Every, ExpertParts, Select, View

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Return the bytes of RAM that can be taken or used as page cache, within a container's limit."""
    available = _meminfo()
    limit = _cgroup_room()
    return available if limit is None else min(available, limit)


def _meminfo() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux: what is installed is the best guess
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_room() -> int | None:
    """Return the bytes left by a cgroup (v2) limit, its page cache counted as free; `None` without a limit."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        kinds = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return max(limit - used + int(kinds["file"]), 0)
    except (OSError, KeyError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class Amount:
    """An amount of weights."""

    parameters: int
    bytes: int

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.parameters + other.parameters, self.bytes + other.bytes)

    def __mul__(self, n: int) -> "Amount":
        return Amount(self.parameters * n, self.bytes * n)


NOTHING = Amount(0, 0)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The weights of a model: in all, and as read by a token."""

    dense: Amount
    experts: Amount
    total: Amount
    experts_per_layer: int
    """Number of experts in the layer that has the most."""
    top_k: int
    """Experts that a token visits in a layer, in the layer where they are the most."""
    bytes_per_expert: int
    expert_bytes_per_token: int
    dense_bytes_per_token: int
    """All of the dense part, but one row of embeddings that serve nothing else."""


def measure(skeleton: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> Sizes:
    """Measure a model by its skeleton on the meta device. Raises `CheckpointError` where experts are missing."""
    modules = seam.find_experts(skeleton)
    layout = expert_layout(skeleton, modules, checkpoint)
    dense, dense_per_token = _dense(skeleton, dtype)
    each = [_expert(layer[0], checkpoint.entries) for layer in layout.experts]
    top_k = [_top_k(skeleton, path) for path in modules]
    experts = sum((one * n for one, n in zip(each, layout.n_experts, strict=True)), NOTHING)
    return Sizes(
        dense=dense,
        experts=experts,
        total=dense + experts,
        experts_per_layer=max(layout.n_experts),
        top_k=max(top_k),
        bytes_per_expert=max(one.bytes for one in each),
        expert_bytes_per_token=sum(one.bytes * k for one, k in zip(each, top_k, strict=True)),
        dense_bytes_per_token=dense_per_token,
    )


def _dense(skeleton: PreTrainedModel, dtype: torch.dtype) -> tuple[Amount, int]:
    """Return the dense part, tied weights counted once, and the bytes of it that a token reads."""
    stored = {id(tensor): tensor for tensor in skeleton.state_dict(keep_vars=True).values()}
    n_all = sum(tensor.numel() for tensor in stored.values())
    embeddings: Any = skeleton.get_input_embeddings()
    head: Any = skeleton.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    n_read = n_all if tied else n_all - embeddings.weight.numel()
    return Amount(n_all, n_all * dtype.itemsize), n_read * dtype.itemsize


def _expert(parts: ExpertParts, entries: Mapping[str, Entry | Quantised]) -> Amount:
    biases = parts.up_bias if parts.down_bias is None else (*parts.up_bias, parts.down_bias)
    return sum((_view(view, entries[view.tensor]) for view in (*parts.up, parts.down, *biases)), NOTHING)


def _view(view: View, entry: Entry | Quantised) -> Amount:
    share = 1
    for step in view.steps:
        if isinstance(step, Select):
            share *= entry.shape[0]
        elif isinstance(step, Every):
            share *= 2
    return Amount(prod(entry.shape) // share, entry.nbytes // share)


def _top_k(skeleton: PreTrainedModel, path: str) -> int:
    """Return how many of a layer's experts a token visits: its router says it, or else the configuration."""
    block = skeleton.get_submodule(path.rpartition(".")[0])
    for module in block.modules():
        if isinstance(found := getattr(module, "top_k", None), int):
            return found
    text: Any = skeleton.config.get_text_config()
    return int(getattr(text, "num_experts_per_tok", None) or text.top_k_experts)


@dataclass(frozen=True, slots=True)
class Fit:
    """How the model fits this machine's memory."""

    ram_available_bytes: int
    fits: Literal["ram", "disk", "no"]
    """Whether all of it fits in RAM, or the dense part with the experts mapped from disk, or nothing."""
    cacheable_expert_bytes: int
    """Bytes of experts that RAM holds beside the dense part."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything known of a checkpoint before it is run."""

    folder: str
    architecture: str
    model_type: str
    dtype: str
    context: int
    layers: int
    moe_layers: int
    packed: bool
    """Whether the rows of all sequences travel in one forward; otherwise each sequence has its own."""
    file_bytes: int
    """Bytes of every stored tensor, unused ones (such as multi-token prediction) included."""
    stored_parameters: int
    """Numbers in all of them, those of quantised ones once decoded."""
    experts_dtype: str
    """Kind of number of the experts' weights."""
    sizes: Sizes
    machine: Fit

    def as_json(self) -> dict[str, Any]:
        """Return all fields, those of `sizes` beside the others."""
        fields: dict[str, Any] = asdict(self)
        sizes: dict[str, Any] = fields.pop("sizes")
        return fields | sizes


def read_facts(model: str | Path, *, trust_remote_code: bool) -> Facts:
    """Inspect a checkpoint folder, a GGUF file, or a hub id in the cache. Raises `ModelError`, `ConfigError`."""
    folder = find_checkpoint(model, download=False)
    config, checkpoint = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    context = model_context(config)
    resolved = resolve(EngineConfig(), checkpoint_dtype=checkpoint_dtype(config, checkpoint), model_context=context)
    skeleton = meta_skeleton(checkpoint, config, trust_remote_code=trust_remote_code)
    refuse_visits(config, skeleton)
    sizes = measure(skeleton, checkpoint, DTYPES[resolved.dtype])
    text = config.get_text_config()
    return Facts(
        folder=str(folder),
        architecture=type(skeleton).__name__,
        model_type=config.model_type,
        dtype=resolved.dtype,
        context=context,
        layers=int(text.num_hidden_layers),
        moe_layers=len(seam.find_experts(skeleton)),
        packed=seems_packed(skeleton),
        file_bytes=sum(entry.nbytes for entry in checkpoint.headers.values()),
        stored_parameters=sum(prod(entry.shape) for entry in checkpoint.entries.values()),
        experts_dtype=_experts_dtype(skeleton, checkpoint),
        sizes=sizes,
        machine=_machine(sizes, available_bytes()),
    )


def _experts_dtype(skeleton: PreTrainedModel, checkpoint: Checkpoint) -> str:
    """Return how experts' matrices are stored, the kinds of all layers side by side."""
    layout = expert_layout(skeleton, seam.find_experts(skeleton), checkpoint)
    views = [view for layer in layout.experts for view in (*layer[0].up, layer[0].down)]
    kinds = dict.fromkeys(checkpoint.entries[view.tensor].dtype for view in views)
    return ", ".join(NAMES.get(kind, kind) for kind in kinds)


NAMES = {name: str(dtype).removeprefix("torch.") for name, dtype in EXPERT_DTYPES.items()}
"""Dtypes of headers, as the rest of the facts names them."""


def _machine(sizes: Sizes, available: int) -> Fit:
    room = available - sizes.dense.bytes
    if room < 0:
        return Fit(available, "no", 0)
    fits: Literal["ram", "disk"] = "ram" if room >= sizes.experts.bytes else "disk"
    return Fit(available, fits, min(room, sizes.experts.bytes))
