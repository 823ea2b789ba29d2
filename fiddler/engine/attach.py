"""Fiddler's experts under plain transformers: `model.generate()` with everything it can do.

The experts of a model from a folder lie outside of it, in the checkpoint's files: their parameters are not
attributes of its modules, so saving, converting, moving or replacing them would silently miss them. Such a model
can run and be copied; its dense part can learn and be adapted; operations that need the experts inside are
refused.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fiddler.calibration.kernels import checked, choose_kernels, compute_lane
from fiddler.config import EngineConfig
from fiddler.devices.cpu import CpuDevice
from fiddler.devices.formula import ExpertFormula
from fiddler.devices.kernels import Kernels
from fiddler.devices.native import native
from fiddler.errors import ModelError
from fiddler.lanes.experts import ComputeLane
from fiddler.models import seam
from fiddler.models.loaded import adopt, load

_State = tuple[ExpertFormula, list[tuple[int, torch.dtype]]]
"""A module's formula, the addresses of its parameters, and their dtypes."""


def attach(model: str | Path | PreTrainedModel, config: EngineConfig | None = None) -> PreTrainedModel:
    """Return a transformers model whose experts Fiddler computes.

    `model` is a checkpoint folder, a GGUF file or a hub id, loaded without its experts, which are then used where
    they lie in the mapped files; or a loaded transformers model, which is changed in place and keeps its weights.
    Beam search, assisted and prompt-lookup decoding and every logits processor are transformers' own.

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


WHOLE = "load the model with transformers and give it to fiddler.attach(model): it keeps its own weights then"
Convert = Callable[[torch.Tensor], torch.Tensor]


def keep_outside(model: PreTrainedModel, folder: str) -> None:
    """From now on, refuse operations that need a model's experts inside it; they lie in `folder`."""
    for experts in seam.find_experts(model).values():
        _derive(experts, _Experts)
        experts._whole = weakref.ref(model)  # a copy of a part does not copy the whole
        experts._folder, experts._probe = folder, torch.empty(0, dtype=model.dtype, device="cpu")
        for name in seam.PARAMETERS:
            experts.__dict__.pop(name, None)
    for module in list(model.modules()):
        inside = tuple(each for each in module.modules() if isinstance(each, _Experts))
        if inside and not isinstance(module, _Experts):
            _derive(module, _Model if module is model else _Holder)
            module.__dict__["_outside"] = inside


def is_outside(model: PreTrainedModel) -> bool:
    """Whether a model's experts lie outside of it."""
    return isinstance(model, _Model)


def _derive(module: Any, guard: type) -> None:
    """Make a module's class a subclass of its own class and of `guard`."""
    own = type(module)
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    module.__class__ = type(own.__name__, (guard, own), names)


class _OutsideError(ModelError, AttributeError):
    """An `AttributeError`, so that `hasattr` says no and defaults are taken."""


class _Missing(torch.Tensor):
    """A parameter that lies outside: it has a name, and any use raises the reason."""

    why = ""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise ModelError(next((each.why for each in args if isinstance(each, cls)), WHOLE))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<{self.why}>"


class _Copied(nn.Module):
    """A module that is copied but not pickled; copies share the experts, which never change."""

    def __copy__(self) -> Any:
        made = type(self).__new__(type(self))
        vars(made).update(vars(self))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = memo[id(self)] = type(self).__new__(type(self))
        vars(made).update({n: v if n == "_fiddler" else deepcopy(v, memo) for n, v in vars(self).items()})
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        again = "attach to that checkpoint again where it is needed"
        self.refuse("pickling the model", "would leave them out", again)

    def refuse(self, action: str, why: str, remedy: str = WHOLE) -> NoReturn:
        """Raise `ModelError`."""
        raise NotImplementedError


class _Experts(_Copied):
    """An experts module without its experts."""

    _whole: "weakref.ref[PreTrainedModel]"
    _folder: str
    _probe: torch.Tensor
    _shapes: Mapping[str, tuple[int, ...]]

    def __getattr__(self, name: str) -> Any:
        if name in seam.PARAMETERS:
            raise _OutsideError(self._missing(name).why)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in (*seam.PARAMETERS, *seam.FORMULA):
            self.refuse(f"setting {name}", "would have no effect")
        super().__setattr__(name, value)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Name the outside parameters too if the module's own are asked for: an adapter is then refused."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        if not recurse:
            for name, shape in self._shapes.items():
                missing = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
                yield (f"{prefix}.{name}" if prefix else name), missing

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in seam.PARAMETERS:
            self.refuse(f"setting {name}", "would have no effect")
        super().register_parameter(name, param)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not hasattr(self._whole(), "peft_config"):
            self.refuse("state_dict()", "would leave them out", f"copy that checkpoint, or {WHOLE}")
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update((prefix + name, self._missing(name)) for name in self._shapes)  # peft takes its own

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if any(name.startswith(prefix) and name.removeprefix(prefix) in seam.PARAMETERS for name in state_dict):
            self.refuse("load_state_dict()", "would leave them as they are")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Convert, recurse: bool = True) -> Any:
        self.check(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _missing(self, name: str) -> "_Missing":
        missing = torch.empty(self._shapes[name], dtype=self._probe.dtype, device="meta").as_subclass(_Missing)
        missing.why = f"{name} is not in the model but in {self._folder}; {WHOLE}"
        return missing

    def check(self, convert: Convert) -> None:
        """Refuse a conversion to another dtype or device."""
        probe = self._probe
        try:
            made = convert(probe)
        except Exception as error:
            raise ModelError(f"the experts lie in {self._folder} and cannot be converted: {error}") from error
        if made.device != probe.device:
            self.refuse(f"moving the model to {made.device}", "would leave them on the CPU")
        if made.dtype != probe.dtype:
            dtype = str(made.dtype).removeprefix("torch.")
            remedy = f"open it anew with EngineConfig(dtype={dtype!r}), or {WHOLE}"
            self.refuse(f"converting the model to {dtype}", "would leave them as they are", remedy)

    def refuse(self, action: str, why: str, remedy: str = WHOLE) -> NoReturn:
        """Raise `ModelError`."""
        raise ModelError(f"the experts lie in {self._folder}: {action} {why}; {remedy}")


class _Holder(_Copied):
    """A module that holds experts modules without experts."""

    _outside: tuple[_Experts, ...]

    def __setattr__(self, name: str, value: Any) -> None:
        inside = value.modules() if isinstance(value, nn.Module) else ()
        if hasattr(value, "modules_to_save") and any(isinstance(each, _Experts) for each in inside):  # peft's copy
            self.refuse(f"adapting {name} with modules_to_save", "would neither train nor save them")
        super().__setattr__(name, value)

    def _apply(self, fn: Convert, recurse: bool = True) -> Any:
        self._outside[0].check(fn)  # before anything is converted
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def refuse(self, action: str, why: str, remedy: str = WHOLE) -> NoReturn:
        """Raise `ModelError`."""
        self._outside[0].refuse(action, why, remedy)


class _Model(_Holder, PreTrainedModel):
    """A whole model with such modules."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = super().__deepcopy__(memo)
        for experts in made._outside:
            experts._whole = weakref.ref(made)
        return made

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        if not getattr(self, "_hf_peft_config_loaded", False):  # transformers then saves the adapters alone
            self.refuse("save_pretrained()", "would leave them out", f"copy that checkpoint, or {WHOLE}")
        super().save_pretrained(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.refuse("push_to_hub()", "would leave them out", f"upload that checkpoint, or {WHOLE}")

    def set_experts_implementation(self, *args: Any, **kwargs: Any) -> None:
        self.refuse("set_experts_implementation()", "would not find them")

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the experts' parameters too, which never learn."""
        inside = super().num_parameters(only_trainable, exclude_embeddings)
        sizes = (torch.Size(shape).numel() for module in self._outside for shape in module._shapes.values())
        return inside if only_trainable else inside + sum(sizes)
