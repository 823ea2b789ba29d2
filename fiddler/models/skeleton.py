"""A transformers model without its experts: dense weights loaded as usual, expert tensors never read.

A multimodal checkpoint may lack the parts of the model that no text goes through (`text_lacks`).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from fiddler.errors import CheckpointError, ModelError, UnsupportedModelError
from fiddler.formats.quantised import Quantised, refuse_unread
from fiddler.given import shown
from fiddler.models import seam
from fiddler.models.alone import alone
from fiddler.models.packing import dry_step
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.folder import (
    CONFIG,
    QUANTISATION,
    is_file,
    parts_of,
    promised_files,
    quantisation,
    read_raw,
)


def text_lacks(model: PreTrainedModel, missing: Iterable[str]) -> list[str]:
    """Return the missing weights that a text needs: those in the decoder, and those that a step of text reads."""
    names = sorted(missing)
    decoder = model.get_decoder()
    if not names or decoder is None or decoder is model or decoder is model.base_model:
        return names  # there is no other part
    stored: Mapping[str, torch.Tensor] = model.state_dict(keep_vars=True)
    of_decoder = {id(tensor) for tensor in decoder.state_dict(keep_vars=True).values()}
    if any(id(stored[name]) in of_decoder for name in names if name in stored):
        return names
    seam.bind(seam.find_experts(model), lambda *_: torch.empty(0))
    with torch.inference_mode(), _Reading() as reading:
        dry_step(model, 1, packed=False)
    return [name for name in names if name not in stored or id(stored[name]) in reading.seen]


class _Reading(TorchFunctionMode):
    """Notes every tensor that torch uses to compute another."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(map(torch.is_tensor, tree_leaves(result))):  # else it was asked for its dtype, shape or device
            self.seen.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf))
        return result


@alone()
def read_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a checkpoint's configuration.

    Raises `CheckpointError` where there is none, `UnsupportedModelError` for a model type transformers does not
    know, one that needs its own code to run, or a quantised checkpoint.
    """
    file = folder / CONFIG
    raw = read_raw(folder)
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(
            f"{file} has no model_type that is a name ({kind!r}): it describes no transformers model"
        )
    _refuse_quantised(raw, folder)
    refuse_endless(raw, file)
    if kind not in transformers.CONFIG_MAPPING and not trust_remote_code:
        code = "; it brings its own code: set trust_remote_code=True to run it" if "auto_map" in raw else ""
        raise UnsupportedModelError(f"transformers {transformers.__version__} does not know {kind!r}{code}")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        if not isinstance(config.get_text_config(), PretrainedConfig):
            raise TypeError("its text_config is no configuration")
    except Exception as error:
        raise CheckpointError(
            f"{file} does not describe a {kind!r} model; correct it or download it again: {error}"
        ) from error
    _without_quantisation(config)
    return config


def _refuse_quantised(raw: dict[str, Any], folder: Path) -> None:
    """Raise `UnsupportedModelError` for a method whose formats are not read, by its name."""
    found = quantisation(raw)
    if (found or _says_quantised(raw)) and str(found.get("quant_method")) not in METHODS:
        method = found.get("quant_method", "unknown")
        bits = found.get("bits") or found.get("w_bit")
        files = sum(file.stat().st_size for file in promised_files(folder) if is_file(file))
        larger = f" (about {files * 16 / bits / 1e9:.1f} GB)" if isinstance(bits, int) and 0 < bits < 16 else ""
        raise UnsupportedModelError(
            f"{folder.name} is quantised ({shown(method)[:40]}), which Fiddler does not read; use a bf16 checkpoint"
            f"{larger}, or one in {', '.join(METHODS)}"
        )


METHODS = (
    *("fp8", "fbgemm_fp8", "mxfp8", "mxfp4", "nvfp4", "modelopt", "modelopt_fp4", "compressed-tensors"),
    *("gptq", "awq", "bitsandbytes"),
)
"""Names of methods, as `quant_method` has them, whose formats are read."""


def _says_quantised(raw: Mapping[str, Any]) -> bool:
    return any(part.get(name) is not None for part in parts_of(raw) for name in QUANTISATION)


def _without_quantisation(config: PretrainedConfig) -> None:
    """Take out what would have transformers quantise: weights come from our own readers, in floats."""
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        for name in QUANTISATION:
            vars(part).pop(name, None) if part is not None else None


MOST_LAYERS = 1000
MOST_LABELS = 100_000
"""Most labels of a configuration: more is damage, and transformers would make lists of that length."""


def refuse_endless(raw: Mapping[str, Any], file: Path) -> None:
    """Raise `CheckpointError` for a configuration of more layers or labels than any model has."""
    for part in (raw, *(value for value in raw.values() if isinstance(value, Mapping))):
        for name, value in part.items():
            most = MOST_LAYERS if "layers" in name else MOST_LABELS if name == "num_labels" else inf
            if isinstance(value, int) and value > most:
                raise CheckpointError(
                    f"{file} asks for {name}={shown(value)}, and no model has so many; download it again"
                )


def _refuse_missing_layers(config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    """Refuse missing layers before they are made: every layer has tensors with its number in their names."""
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    n_numbered = 1 + max((int(part) for name in checkpoint.entries for part in _NUMBER.findall(name)), default=-1)
    if isinstance(n_layers, int) and n_layers > n_numbered:
        raise CheckpointError(
            f"config.json asks for {n_layers} layers, and the files hold {n_numbered} at most; "
            "download the checkpoint again"
        )


_NUMBER = re.compile(r"(?<!\w)\d{1,9}(?!\w)")


def text_model(
    config: PretrainedConfig, folder: Path, *, trust_remote_code: bool
) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """Return the class that makes text from this configuration, and the part of the configuration it takes.

    A multimodal checkpoint's is the whole model, run without its towers, or a part of it that makes text by itself.
    Raises `UnsupportedModelError` without one.
    """
    if mapped := _mapped(config):
        return mapped
    for name in config.architectures or ():  # some are in no auto mapping, but named by their checkpoints
        named = getattr(transformers, name, None)
        if (
            isinstance(named, type)
            and _makes_text(named)
            and isinstance(config, getattr(named, "config_class", ()))
        ):
            return named, config
    for key in config.sub_configs:
        if mapped := _mapped(getattr(config, key, None)):
            return mapped
    reference = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    if trust_remote_code and reference:
        remote: type[PreTrainedModel] = get_class_from_dynamic_module(reference, folder)
        return remote, config
    raise UnsupportedModelError(f"{config.model_type!r} has no class in transformers that generates text")


def _mapped(config: PretrainedConfig | None) -> tuple[type[PreTrainedModel], PretrainedConfig] | None:
    """Return the class that transformers' auto classes would: a causal LM of the text, or the whole model."""
    causal: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    multimodal: Any = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    for mapping in (causal, multimodal):
        if config is not None and type(config) in mapping:
            found = mapping[type(config)]
            cls: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
            if _makes_text(cls):
                of_text = cls.config_class is config.sub_configs.get("text_config")
                return cls, config.get_text_config() if of_text else config
    return None


def _makes_text(cls: type) -> bool:
    """Whether a class makes text token by token, rather than only holding models that do."""
    if not (issubclass(cls, PreTrainedModel) and issubclass(cls, transformers.GenerationMixin)):
        return False
    return cls.forward is not torch.nn.Module.forward


@alone()
def load_skeleton(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load everything but the experts into memory of its own, with the experts seam in place.

    It attends as transformers chooses. Raises `UnsupportedModelError` for a model without the seam,
    `CheckpointError` for weights that are missing or of the wrong shape, `ModelError` where transformers cannot
    load it.
    """
    folder = checkpoint.folder
    refuse_unread(checkpoint.entries)
    whole, config = text_model(config, folder, trust_remote_code=trust_remote_code)
    _refuse_missing_layers(config, checkpoint)
    cls: Any = _hollow(whole, _most(checkpoint))
    config._experts_implementation = seam.NAME
    try:
        model, report = cls.from_pretrained(
            None,  # one reader for all: two would answer two questions of which files are the checkpoint
            state_dict={name: _Lazy(checkpoint, name, dtype) for name in checkpoint.entries},
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below with their names
        )
        _add_generation(model, folder, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ModelError(
            f"transformers cannot load {folder.name} ({config.model_type}); check {CONFIG}: {why}"
        ) from error
    missing = text_lacks(model, report["missing_keys"])
    _check(model, {**report, "missing_keys": missing})
    model.eval().requires_grad_(False)
    skeleton: PreTrainedModel = model
    return skeleton


@dataclass(frozen=True, slots=True)
class _Lazy:
    """A tensor that transformers reads when it wants it, as it does safetensors' slices."""

    checkpoint: Checkpoint
    name: str
    dtype: torch.dtype

    def __getitem__(self, _all: Any) -> torch.Tensor:
        if isinstance(self.checkpoint.entries[self.name], Quantised):
            return self.checkpoint.tensor(self.name, dtype=self.dtype)
        return self.checkpoint.stored(self.name).clone()  # the mapping cannot be written to, and a file may change


def _add_generation(model: Any, folder: Path, *, trust_remote_code: bool) -> None:
    """Do what `from_pretrained` does besides loading weights."""
    model.name_or_path = model.config.name_or_path = str(folder)
    if not folder.is_dir():  # a GGUF file, whose options are in its configuration
        return
    if hasattr(model, "adjust_generation_fn") and model.can_generate():
        hub = {"cache_dir": None, "force_download": False, "proxies": None, "token": None, "revision": "main"}
        model.adjust_generation_fn(
            None,
            False,
            None,
            str(folder),
            local_files_only=True,
            subfolder="",
            trust_remote_code=trust_remote_code,
            **hub,
        )


def set_attention(model: PreTrainedModel, name: str) -> str:
    """Let a text model attend by another implementation; returns the name of the one before.

    Towers are not run, and some know none but transformers' own.
    """
    config, text = model.config, model.config.get_text_config()
    before: str = text._attn_implementation
    model.set_attn_implementation(
        {"": name} | {k: name for k in config.sub_configs if getattr(config, k, None) is text}
    )
    return before


def meta_skeleton(
    checkpoint: Checkpoint | None, config: PretrainedConfig, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model without its experts and without any weight, for its shapes and names.

    Raises `UnsupportedModelError` for a model without the seam, `CheckpointError` where it has far more weights
    than `checkpoint`, if there is one, `ModelError` where transformers cannot build it.
    """
    folder, most = (Path(), inf) if checkpoint is None else (checkpoint.folder, _most(checkpoint))
    whole, config = text_model(config, folder, trust_remote_code=trust_remote_code)
    if checkpoint is not None:
        refuse_unread(checkpoint.entries)
        _refuse_missing_layers(config, checkpoint)
    cls: Any = _hollow(whole, most)
    try:
        with alone(), torch.device("meta"):
            skeleton: PreTrainedModel = cls(config)
    except ModelError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ModelError(f"transformers cannot build {config.model_type}; check {CONFIG}: {why}") from error
    return skeleton


def _most(checkpoint: Checkpoint) -> int:
    """Return an upper limit of the dense part's numbers: twice those in the files, and a small tower."""
    return 2 * sum(prod(entry.shape) for entry in checkpoint.entries.values()) + 10**8


def _hollow(cls: type[PreTrainedModel], most: float) -> type[PreTrainedModel]:
    """Return a subclass that empties its experts right after it is built.

    Its constructor raises `CheckpointError` where the dense part has more numbers than `most`: else a damaged
    configuration would fill memory before its weights are found missing.
    """

    def __init__(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        cls.__init__(self, config, *args, **kwargs)
        experts = seam.find_experts(self)
        if not experts:
            raise UnsupportedModelError(
                f"{config.model_type!r} has no experts behind transformers' experts registry: it is dense, or its "
                "experts are computed in code of its own; Fiddler runs Mixture-of-Experts models only"
            )
        for module in experts.values():
            _empty(module)
        n = sum(tensor.numel() for tensor in (*self.parameters(), *self.buffers()))
        if n > most:
            raise CheckpointError(
                f"config.json describes a dense part of {n:,} numbers, and the files hold fewer; "
                "download the checkpoint again"
            )

    # transformers finds conversions by class name and capabilities by reading the class's module. It would make a
    # table of all tensors that it has no place for, the experts' among them, if they were not expected.
    expected = {"_keys_to_ignore_on_load_unexpected": [""]}
    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__, **expected})


def _empty(module: seam.ExpertsModule) -> None:
    """Replace the experts' parameters by zero-size tensors that are not parameters.

    Outside the state dict no checkpoint tensor finds them; marked as initialised, transformers leaves them alone.
    """
    module._shapes = {}
    for name in seam.PARAMETERS:
        if isinstance(parameter := getattr(module, name, None), torch.nn.Parameter):
            module._shapes[name] = tuple(parameter.shape)
            delattr(module, name)
            placeholder: Any = torch.empty(0, dtype=torch.float32, device="cpu")
            placeholder._is_hf_initialized = True
            setattr(module, name, placeholder)


def _check(model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Nothing may be left unloaded, and the experts must still be the placeholders."""
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if names := sorted(map(str, report[problem])):
            kind = problem.partition("_")[0]
            raise CheckpointError(f"{kind} weights: {len(names)}, first {names[0]}; download the checkpoint again")
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise ModelError(f"{model.config.model_type}: {len(left)} tensors were not loaded, first {left[0]}")
    for path, module in seam.find_experts(model).items():
        if module.down_proj.numel():
            raise ModelError(f"{path}: transformers replaced the experts while loading")
