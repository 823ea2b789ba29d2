"""Fiddler's experts under plain transformers: `model.generate()` with everything it can do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fiddler.config import EngineConfig
from fiddler.devices.cpu import CpuDevice
from fiddler.devices.kernels import Kernels
from fiddler.devices.native import native
from fiddler.engine.setup import checked, choose_kernels, compute_lane
from fiddler.errors import ModelError
from fiddler.lanes.compute import ComputeLane
from fiddler.models import seam
from fiddler.models.loaded import adopt, load
from fiddler.models.outside import is_outside, keep_outside

_State = tuple[tuple[int, torch.dtype], ...]
"""Where a module's parameters lie, and their dtypes."""


def attach(model: str | Path | PreTrainedModel, config: EngineConfig | None = None) -> PreTrainedModel:
    """Return a transformers model whose experts Fiddler computes.

    `model` is a checkpoint folder or a hub id, loaded without its experts, which are then used where they lie in
    the mapped files; or a loaded transformers model, which is changed in place and keeps its weights. Beam search,
    assisted and prompt-lookup decoding and every logits processor are transformers' own.

    A loaded model can all that it could before: it is saved, converted, moved, trained and adapted. One from a
    folder has only its dense part as parameters: what would need the experts too (saving, another dtype or device,
    adapters of experts) raises `ModelError`.

    Raises `ModelError`, `UnsupportedModelError` for a model without the experts seam among them.
    """
    options = checked(config)
    if isinstance(model, PreTrainedModel):
        if is_outside(model):
            raise ModelError("the model is attached already; its experts lie in its checkpoint's files")
        mine = adopt(model)
        seam.bind(mine.experts, OwnExperts([*mine.experts.values()], choose_kernels(mine, options)))
        return mine.model
    loaded = load(model, options, packed=False)
    store = loaded.store
    loaded.model.register_forward_hook(lambda *_: store.check())
    seam.bind(loaded.experts, compute_lane(loaded, choose_kernels(loaded, options)).run)
    keep_outside(loaded.model, str(loaded.model.name_or_path))
    return loaded.model


class OwnExperts:
    """Computes the experts of a model that keeps them as parameters, as these are when it is asked.

    It is copied and pickled with the model, and belongs to the copy then.
    """

    def __init__(self, modules: Sequence[seam.ExpertsModule], kernels: Kernels) -> None:
        """`modules` are the experts modules in layer order."""
        self._modules, self._kernels = modules, kernels
        self._lanes: dict[int, tuple[_State, ComputeLane]] = {}

    def __call__(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return a layer's output `[T, H]`.

        It is transformers' own where somebody learns, where parameters are computed (by an adapter), where they lie
        on another device, or are of another dtype than the rows.
        """
        module = self._modules[layer]
        tensors = seam.own_tensors(module)
        if tensors is None or not _fit(hidden, tensors) or _learns(hidden, weights, *tensors):
            output: Tensor = seam.own_forward(module)(module, hidden, index, weights)
            return output
        return self._lane(layer, tensors).run(0, hidden, index, weights)

    def _lane(self, layer: int, tensors: Sequence[Tensor]) -> ComputeLane:
        """Return what runs a layer while its parameters lie where they do."""
        state = tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors)
        known = self._lanes.get(layer)
        if known is None or known[0] != state:
            known = self._lanes[layer] = state, self._make_lane(self._modules[layer])
        return known[1]

    def _make_lane(self, module: seam.ExpertsModule) -> ComputeLane:
        n_experts = module.down_proj.shape[0]
        with torch.no_grad():
            views = [seam.module_weights(module, expert) for expert in range(n_experts)]
        device = CpuDevice(lambda _, expert: views[expert], (seam.formula(module),), self._kernels)
        return ComputeLane(device, (n_experts,))

    def __getstate__(self) -> dict[str, Any]:
        return {"modules": self._modules, "choice": dict(self._kernels.choice)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ours = native() if "native" in state["choice"].values() else None
        usable = {key: name for key, name in state["choice"].items() if ours is not None or name != "native"}
        OwnExperts.__init__(self, state["modules"], Kernels(usable, ours))


def _fit(hidden: Tensor, tensors: Sequence[Tensor]) -> bool:
    return all(t.device.type == "cpu" and t.dtype == hidden.dtype for t in (hidden, *tensors))


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
