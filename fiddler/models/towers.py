"""What a multimodal checkpoint may lack: a part of the model that no text goes through."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from fiddler.models import seam
from fiddler.models.dry import dry_step


def text_lacks(model: PreTrainedModel, missing: Iterable[str]) -> list[str]:
    """Return those of the missing weights that a text needs: what lies in the decoder, or a step of text reads."""
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
    """Notes every tensor that torch makes another one of."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(map(torch.is_tensor, tree_leaves(result))):  # else it was asked for its dtype, shape or device
            self.seen.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf))
        return result
