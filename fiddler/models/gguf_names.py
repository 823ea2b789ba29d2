"""Gives a GGUF file's tensors their places in a transformers model.

Names of the dense part, and what llama.cpp's converter did to its numbers, are looked up in transformers' own GGUF
loader, tensor by tensor. Experts need no table: every architecture has them as `blk.L.ffn_{gate,up,down}_exps`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers import core_model_loading as loading

from fiddler.errors import CheckpointError, UnsupportedModelError
from fiddler.formats.gguf import CODES, GgufTensor, Undo
from fiddler.models.gguf_config import refuse_unknown
from fiddler.models.gguf_experts import EXPERTS
from fiddler.models.skeleton import meta_skeleton
from fiddler.store.gguf import FLOATS
from fiddler.store.gguf_files import GgufCheckpoint, of

_UNUSED = "mtp."
"""Beginning of transformers' names for blocks that guess several tokens ahead, which its models do not have."""

_Places = dict[str, tuple[str, Undo | None]]
"""A model's names to the file's, and what is to be undone."""


def placed(checkpoint: GgufCheckpoint, config: PretrainedConfig) -> GgufCheckpoint:
    """Return a checkpoint whose tensors have the names that the model of `config` has, but for the experts'.

    Raises `UnsupportedModelError` for a tensor that has no place in the model, and for experts of a type
    that is not run packed.
    """
    architecture = refuse_unknown(checkpoint)
    n_layers: int = config.get_text_config().num_hidden_layers
    matches = {name: EXPERTS.fullmatch(name) for name in checkpoint.headers}
    experts = {name for name, match in matches.items() if match is not None and int(match[1]) < n_layers}
    skeleton = meta_skeleton(checkpoint, config)
    rest = [name for name in checkpoint.headers if name not in experts]
    try:
        places, unused = _places(architecture, skeleton, rest)
    except Exception as error:
        raise CheckpointError(f"the metadata of {checkpoint.folder} describe no {architecture}: {error}") from error
    known = {name for name, _ in places.values()} | unused
    if strange := [name for name in rest if name not in known]:
        raise UnsupportedModelError(
            f"{checkpoint.folder} has {strange[0]!r} ({len(strange)} such tensors), which has no place in "
            f"{type(skeleton).__name__}; give the safetensors version of the model"
        )
    _refuse_types(checkpoint, experts)
    dense = {mine: _named(checkpoint, mine, name, undo) for mine, (name, undo) in places.items()}
    return checkpoint.placed(dense, experts)


def _named(checkpoint: GgufCheckpoint, mine: str, name: str, undo: Undo | None) -> GgufTensor:
    return replace(of(checkpoint.described[name]), name=mine, undo=undo)


def _refuse_types(checkpoint: GgufCheckpoint, experts: Iterable[str]) -> None:
    for name in sorted(experts):
        kind = checkpoint.described[name].kind
        if kind not in FLOATS and kind.lower() not in CODES:
            raise UnsupportedModelError(
                f"{name} is {kind}, and experts are run from {', '.join(map(str.upper, CODES))}, BF16, F16, F32; "
                "use another file of this model, such as its Q4_K_M, or the safetensors version"
            )


def _places(architecture: str, skeleton: PreTrainedModel, names: list[str]) -> tuple[_Places, set[str]]:
    """Return the tensors' places, and which of them no model has one for."""
    from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS

    if architecture in GGUF_ARCHS:
        return _converted(GGUF_ARCHS[architecture](skeleton.config), names)
    return _processed(architecture, skeleton, names), set()


def _converted(mapping: list[Any], names: list[str]) -> tuple[_Places, set[str]]:
    """Look names up in a mapping of renamings and converters, as transformers' younger loader has them."""
    renamings = [each for each in mapping if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, loading.WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    places, unused = _Places(), set[str]()
    for name in names:
        mine, pattern = loading.rename_source_key(name, renamings, converters)
        if mine.startswith(_UNUSED):
            unused.add(name)
        else:
            places[mine] = name, None if pattern is None else _reversed(by_pattern[pattern])
    return places, unused


def _reversed(converter: Any) -> Undo:
    source, target = converter.source_patterns[:1], converter.target_patterns[:1]

    def undo(tensor: Tensor) -> Tensor:
        for operation in converter.operations:
            (tensor,) = operation.convert({source[0]: tensor}, source, target).values()
        return tensor

    return undo


def _processed(architecture: str, skeleton: PreTrainedModel, names: list[str]) -> _Places:
    """Look names up in gguf-py's map of them, by transformers' older loader."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    cls: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = cls(config=skeleton.config.to_dict())
    names_of: Callable[..., dict[str, str]] = get_gguf_hf_weights_map
    found = names_of(_Whole(skeleton), processor)
    places = _Places()
    for name in names:
        mine = found.get(name) or found.get(name.removesuffix(".weight"))  # sinks have no such ending in a model
        if mine is not None:
            places[mine] = name, _by_processor(processor, name)
    return places


@dataclass(frozen=True, slots=True)
class _Whole:
    """A model as transformers' loader asks for it, without its parts: each would build gguf-py's map anew."""

    model: PreTrainedModel

    @property
    def config(self) -> PretrainedConfig:
        """The model's own."""
        return self.model.config

    def state_dict(self) -> dict[str, Tensor]:
        """Return the model's own."""
        return dict(self.model.state_dict())

    def named_children(self) -> tuple[()]:
        """Return no part: all names are in the whole."""
        return ()


def _by_processor(processor: Any, name: str) -> Undo | None:
    process: Callable[..., Any] = processor.process
    sample = np.zeros((2, 2), dtype=np.float32)
    if process(sample, name, tensor_key_mapping={}, parsed_parameters={}).weights is sample:
        return None

    def undo(tensor: Tensor) -> Tensor:
        return torch.from_numpy(process(tensor.numpy(), name, tensor_key_mapping={}, parsed_parameters={}).weights)

    return undo
