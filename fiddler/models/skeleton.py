"""A transformers model without its experts: dense weights loaded as usual, expert tensors never read."""

import functools
import json
import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from fiddler.errors import CheckpointError, ModelError, UnsupportedModelError
from fiddler.models import seam


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a checkpoint's configuration.

    Raises `CheckpointError` where there is none, `UnsupportedModelError` for a model type transformers does not
    know or a quantised checkpoint.
    """
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is missing or not JSON; the folder is not a transformers checkpoint") from error
    if "quantization_config" in raw:
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModelError(f"{folder.name} is quantised ({method}); use a bf16, fp16 or fp32 checkpoint")
    if not trust_remote_code and "auto_map" in raw:
        _refuse_remote_code(folder, raw)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        kind = raw.get("model_type")
        raise UnsupportedModelError(f"transformers {transformers.__version__} cannot read {kind!r}: {error}") from error


def _refuse_remote_code(folder: Path, raw: dict[str, Any]) -> None:
    if raw.get("model_type") not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{folder.name} brings its own Python code ({raw.get('model_type')!r} is not part of transformers); "
            "set trust_remote_code=True to run it"
        )


def model_class(config: PretrainedConfig, folder: Path, *, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """Return the class that makes text from this configuration. Raises `UnsupportedModelError` if there is none."""
    reference = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    if trust_remote_code and reference and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        loaded = transformers.dynamic_module_utils.get_class_from_dynamic_module(reference, folder)
        return loaded  # type: ignore[no-any-return]
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise UnsupportedModelError(f"{config.model_type!r} has no class in transformers that generates text")


def load_skeleton(
    folder: Path,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str | None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load everything but the experts, with the experts seam in place.

    `attention` is an attention implementation's name, `None` for transformers' own choice. Raises
    `UnsupportedModelError` for a model without the seam and `ModelError` where transformers cannot load it.
    """
    cls = _hollow(model_class(config, folder, trust_remote_code=trust_remote_code))
    config._experts_implementation = seam.NAME
    try:
        with _quiet():
            model = cls.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=True,
                use_safetensors=True,
            )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"transformers cannot load {folder.name} ({config.model_type}): {error}") from error
    _check(model)
    return model.eval().requires_grad_(False)


@functools.cache
def _hollow(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a subclass that empties its experts right after it is built."""

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

    # transformers finds conversions by class name and capabilities by reading the class's module.
    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})


def _empty(module: nn.Module) -> None:
    """Replace the experts' parameters by zero-size tensors that are not parameters.

    Outside the state dict no checkpoint tensor finds them; marked as initialised, transformers leaves them alone.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        if name == "down_proj":
            module._n_experts = parameter.shape[0]
        if name in _EXPERT_PARAMETERS:
            delattr(module, name)
            placeholder = torch.empty(0, device="cpu")
            placeholder._is_hf_initialized = True  # type: ignore[attr-defined]
            setattr(module, name, placeholder)


_EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


def _check(model: PreTrainedModel) -> None:
    """Nothing may be left unloaded, and the experts must still be the placeholders."""
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise ModelError(f"{model.config.model_type}: {len(left)} tensors were not loaded, first {left[0]}")
    for path, module in seam.find_experts(model).items():
        if module.down_proj.numel():
            raise ModelError(f"{path}: transformers replaced the experts while loading")


@contextmanager
def _quiet() -> Generator[None]:
    """Silence reports of the experts we keep out on purpose, and progress bars of the part that is quick."""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
