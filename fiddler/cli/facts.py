"""What a checkpoint is, from its configuration and its files' headers. No weight is read."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fiddler.cli.machine import available_bytes
from fiddler.cli.sizes import Sizes, measure
from fiddler.config import EngineConfig, resolve
from fiddler.devices.formula import DTYPES
from fiddler.models import seam
from fiddler.models.loaded import checkpoint_dtype, model_context, refuse_visits, seems_packed
from fiddler.models.skeleton import meta_skeleton, read_config
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.source import find_checkpoint


@dataclass(frozen=True, slots=True)
class Machine:
    """How the model fits this machine's memory."""

    ram_available_bytes: int
    fits: Literal["ram", "disk", "no"]
    """In RAM whole; its dense part in RAM and its experts mapped from disk; not at all."""
    cacheable_expert_bytes: int
    """Bytes of experts that RAM holds beside the dense part."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What there is to know of a checkpoint before it is run."""

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
    """Of every tensor stored, those that are not used (such as multi-token prediction) included."""
    sizes: Sizes
    machine: Machine

    def as_json(self) -> dict[str, Any]:
        """Return all fields, those of `sizes` beside the others."""
        fields: dict[str, Any] = asdict(self)
        sizes: dict[str, Any] = fields.pop("sizes")
        return fields | sizes


def read_facts(model: str | Path, *, trust_remote_code: bool) -> Facts:
    """Inspect a checkpoint folder or a hub id that is in the cache. Raises `ModelError`, `ConfigError`."""
    folder = find_checkpoint(model, download=False)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint.open(folder)
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
        file_bytes=sum(entry.nbytes for entry in checkpoint.entries.values()),
        sizes=sizes,
        machine=_machine(sizes, available_bytes()),
    )


def _machine(sizes: Sizes, available: int) -> Machine:
    room = available - sizes.dense.bytes
    if room < 0:
        return Machine(available, "no", 0)
    fits: Literal["ram", "disk"] = "ram" if room >= sizes.experts.bytes else "disk"
    return Machine(available, fits, min(room, sizes.experts.bytes))
