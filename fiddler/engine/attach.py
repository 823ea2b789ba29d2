"""Fiddler's experts under plain transformers: `model.generate()` with everything it can do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fiddler.calibration.kernels import checked, choose_kernels, compute_lane
from fiddler.config import EngineConfig
from fiddler.devices.cpu import CpuDevice, ExpertFormula
from fiddler.devices.kernels import Kernels
from fiddler.devices.native import native
from fiddler.errors import ModelError
from fiddler.lanes.experts import ComputeLane
from fiddler.models import seam
from fiddler.models.loaded import adopt, load
from fiddler.models.outside import is_outside, keep_outside

_State = tuple[ExpertFormula, list[tuple[int, torch.dtype]]]
"""A module's formula, the addresses of its parameters, and their dtypes."""


def attach(model: str | Path | PreTrainedModel, config: EngineConfig | None = None) -> PreTrainedModel:
    """Return a transformers model whose experts Fiddler computes.

    `model` is a checkpoint folder or a hub id, loaded without its experts, which are then used where they lie in
    the mapped files; or a loaded transformers model, which is changed in place and keeps its weights. Beam search,
    assisted and prompt-lookup decoding and every logits processor are transformers' own.

    A loaded model can do all that it could before: be saved, converted, moved, trained and adapted. One from a
    folder has only its dense part as parameters: operations that would need the experts too (saving, another dtype
    or device, adapters of experts) raise `ModelError`.

    Raises `ModelError`, `UnsupportedModelError` for a model without the experts seam among them.
    """
    options = checked(config)
    if isinstance(model, PreTrainedModel):
        if is_outside(model):
            raise ModelError("the model is attached already; its experts lie in its checkpoint's files")
        mine = adopt(model)
        kernels = choose_kernels(mine, options)
        for path, module in mine.experts.items():
            seam.bind({path: module}, OwnExperts(module, kernels))
        return mine.model
    return _from_folder(model, options)


@torch.inference_mode(False)  # or what looks at the weights could not learn, for it was made in the caller's mode
def _from_folder(model: str | Path, options: EngineConfig) -> PreTrainedModel:
    loaded = load(model, options, packed=False)
    store = loaded.store
    loaded.model.register_forward_hook(lambda *_: store.check())
    seam.bind(loaded.experts, compute_lane(loaded, choose_kernels(loaded, options)).run)
    loaded.model.requires_grad_(True)  # as transformers has it
    keep_outside(loaded.model, str(loaded.model.name_or_path))
    return loaded.model


class OwnExperts:
    """Computes the experts of a module that keeps them as parameters, always with their present values.

    It is copied and pickled with the module, and belongs to the copy then.
    """

    def __init__(self, module: seam.ExpertsModule, kernels: Kernels) -> None:
        self._module, self._kernels = module, kernels
        self._known: tuple[_State, ComputeLane] | None = None

    def __call__(self, _layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the experts' output `[T, H]`.

        transformers' own code computes it where gradients are wanted, where parameters are computed (by an
        adapter), lie on another device, or have another dtype than the rows.
        """
        module = self._module
        tensors = seam.own_tensors(module)
        if tensors is None or not _fit(hidden, tensors) or _learns(hidden, weights, *tensors):
            output: Tensor = seam.own_forward(module)(module, hidden, index, weights)
            return output
        return self._lane(tensors).run(0, hidden, index, weights)

    def _lane(self, tensors: Sequence[Tensor]) -> ComputeLane:
        """Return the compute lane of the module, made anew when its formula or parameters have changed."""
        state = seam.formula(self._module), [(tensor.data_ptr(), tensor.dtype) for tensor in tensors]
        if self._known is None or self._known[0] != state:
            self._known = state, self._make_lane()
        return self._known[1]

    def _make_lane(self) -> ComputeLane:
        module = self._module
        n_experts = module.down_proj.shape[0]
        with torch.no_grad():
            views = [seam.module_weights(module, expert) for expert in range(n_experts)]
        device = CpuDevice(lambda _, expert: views[expert], (seam.formula(module),), self._kernels)
        return ComputeLane(device, (n_experts,))

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self._module, "choice": dict(self._kernels.choice)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ours = native() if "native" in state["choice"].values() else None
        usable = {key: name for key, name in state["choice"].items() if ours is not None or name != "native"}
        OwnExperts.__init__(self, state["module"], Kernels(usable, ours))


def _fit(hidden: Tensor, tensors: Sequence[Tensor]) -> bool:
    return all(t.device.type == "cpu" and t.dtype == hidden.dtype for t in (hidden, *tensors))


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
