"""What one does without enough memory: transformers, with accelerate fetching every layer's weights from disk.

transformers leaves attention and norms in the checkpoint, but writes the experts of a layer, which it fuses, anew.
accelerate maps each tensor when its module is called and lets go of it after the call, so on the CPU only visited
experts are read. Where memory is left, the operating system keeps what was read, and page faults are the cost.
"""

import gc
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench import checkpoints
from bench.machine import free_bytes
from bench.peers import forwards
from bench.peers.peer import Tokens, installed, require
from bench.workload import Run, Workload

LAYERS_AT_ONCE = 2
"""Loading fuses a layer's experts from their parts, which took the memory of 1.3 to 1.7 layers."""


def open_peer(name: str, folder: Path, threads: int) -> "AccelerateDiskPeer":
    """Open transformers with its layers on disk.

    Raises `UnavailableError` where accelerate is not installed, or memory or disk have no room.
    """
    installed("accelerate", "accelerate")
    checkpoints.CACHE.mkdir(parents=True, exist_ok=True)
    # Not where temporary files are: that may be memory.
    offload = TemporaryDirectory(prefix="offload-", dir=checkpoints.CACHE)
    try:
        return AccelerateDiskPeer(_load(folder, Path(offload.name)), offload, threads)
    except BaseException:
        offload.cleanup()
        raise


def _load(folder: Path, offload: Path) -> PreTrainedModel:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    places = _places(skeleton)
    _check_room(skeleton, places, offload)
    transformers.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, device_map=places, offload_folder=offload
    )
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


def _places(model: PreTrainedModel) -> dict[str, str]:
    """Return where each module goes: what is in a list, the layers, to the disk, and all else to memory."""
    prefix = model.base_model_prefix
    places = {name: "cpu" for name, _ in model.named_children() if name != prefix}
    for name, module in model.get_submodule(prefix).named_children():
        if isinstance(module, nn.ModuleList):
            places |= {f"{prefix}.{name}.{i}": "disk" for i in range(len(module))}
        else:
            places[f"{prefix}.{name}"] = "cpu"
    return places


def _check_room(model: PreTrainedModel, places: dict[str, str], offload: Path) -> None:
    n_bytes = {name: sum(p.nbytes for p in model.get_submodule(name).parameters()) for name in places}
    layers = [n_bytes[name] for name, place in places.items() if place == "disk"]
    memory = sum(n_bytes.values()) - sum(layers) + LAYERS_AT_ONCE * max(layers, default=0)
    require("memory", memory, free_bytes())
    require("disk", sum(layers), shutil.disk_usage(offload).free)


class AccelerateDiskPeer:
    """A model whose layers lie on disk."""

    def __init__(self, model: PreTrainedModel, offload: TemporaryDirectory[str], threads: int) -> None:
        self._model: PreTrainedModel | None = model
        self._offload = offload
        self._threads = threads

    def run(self, workload: Workload, prompts: Tokens, made: Tokens, patience_s: float) -> Run:
        """Run a workload, see `Peer`."""
        assert self._model is not None, "the peer is closed"
        torch.set_num_threads(self._threads)
        return forwards.run(self._model, workload, prompts, made, patience_s)

    def close(self) -> None:
        """Let go of the model and remove what was written to disk."""
        self._model = None
        gc.collect()  # accelerate's hooks and the modules refer to each other
        self._offload.cleanup()
