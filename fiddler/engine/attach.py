"""Fiddler's experts under plain transformers: `model.generate()` with everything it can do."""

from pathlib import Path

from transformers import PreTrainedModel

from fiddler.config import EngineConfig
from fiddler.engine.setup import checked, choose_kernels, compute_lane
from fiddler.models import seam
from fiddler.models.loaded import ServableModel, adopt, load


def attach(model: str | Path | PreTrainedModel, config: EngineConfig | None = None) -> PreTrainedModel:
    """Return a transformers model whose experts Fiddler computes.

    `model` is a checkpoint folder or a hub id, loaded without its experts, which are then used where they lie in
    the mapped files; or a loaded transformers model, which is changed in place and keeps its weights. Beam search,
    assisted and prompt-lookup decoding and every logits processor are transformers' own. Raises `ModelError`,
    `UnsupportedModelError` for a model without the experts seam among them.
    """
    options = checked(config)
    loaded = adopt(model) if isinstance(model, PreTrainedModel) else load(model, options, packed=False)
    if isinstance(loaded, ServableModel):
        store = loaded.store
        loaded.model.register_forward_hook(lambda *_: store.check())
    seam.bind(loaded.experts, compute_lane(loaded, choose_kernels(loaded, options)).run)
    return loaded.model
