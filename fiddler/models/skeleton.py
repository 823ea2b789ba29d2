"""A transformers model without its experts: dense weights loaded as usual, expert tensors never read."""

import json
import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging

from fiddler.errors import CheckpointError, ModelError, UnsupportedModelError
from fiddler.models import seam


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a checkpoint's configuration.

    Raises `CheckpointError` where there is none, `UnsupportedModelError` for a model type transformers does not
    know, one that needs its own code to run, or a quantised checkpoint.
    """
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text())
        kind = raw.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is missing or not JSON: this is not a transformers checkpoint") from error
    if "quantization_config" in raw:
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModelError(f"{folder.name} is quantised ({method}); use a bf16, fp16 or fp32 checkpoint")
    if kind not in transformers.CONFIG_MAPPING and not trust_remote_code:
        code = "; it brings its own code: set trust_remote_code=True to run it" if "auto_map" in raw else ""
        raise UnsupportedModelError(f"transformers {transformers.__version__} does not know {kind!r}{code}")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise CheckpointError(f"{file} does not describe a {kind!r} model: {error}") from error
    return config


def model_class(config: PretrainedConfig, folder: Path, *, trust_remote_code: bool) -> type[PreTrainedModel]:
    """Return the class that makes text from this configuration. Raises `UnsupportedModelError` without one."""
    causal: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    multimodal: Any = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    for mapping in (causal, multimodal):
        if type(config) in mapping:
            found = mapping[type(config)]
            cls: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
            return cls
    for name in config.architectures or ():  # some are in no auto mapping, but named by their checkpoints
        if isinstance(named := getattr(transformers, name, None), type) and issubclass(named, PreTrainedModel):
            return named
    reference = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    if trust_remote_code and reference:
        remote: type[PreTrainedModel] = get_class_from_dynamic_module(reference, folder)
        return remote
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
    `UnsupportedModelError` for a model without the seam, `CheckpointError` for weights that are missing or of the
    wrong shape, `ModelError` where transformers cannot load it.
    """
    cls: Any = _hollow(model_class(config, folder, trust_remote_code=trust_remote_code))
    config._experts_implementation = seam.NAME
    try:
        with _quiet():
            model, report = cls.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"transformers cannot load {folder.name} ({config.model_type}): {error}") from error
    _check(model, report)
    model.eval().requires_grad_(False)
    skeleton: PreTrainedModel = model
    return skeleton


def meta_skeleton(folder: Path, config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model without its experts and without any weight, for its shapes and names.

    Raises `UnsupportedModelError` for a model without the seam.
    """
    cls: Any = _hollow(model_class(config, folder, trust_remote_code=trust_remote_code))
    with torch.device("meta"), _quiet():
        skeleton: PreTrainedModel = cls(config)
    return skeleton


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


_UP_OR_DOWN = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


def _empty(module: seam.ExpertsModule) -> None:
    """Replace the experts' parameters by zero-size tensors that are not parameters.

    Outside the state dict no checkpoint tensor finds them; marked as initialised, transformers leaves them alone.
    """
    module._n_experts = module.down_proj.shape[0]
    for name in _UP_OR_DOWN:
        if isinstance(getattr(module, name, None), torch.nn.Parameter):
            delattr(module, name)
            placeholder: Any = torch.empty(0, device="cpu")
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
