"""Which architectures share packed forwards, and a dry step that checks it.

A dry step visits no expert: it shows which layers a model asks experts for and how much memory the step takes,
without reading an expert.

The exactness suite proves every entry of `PACKED`: packed steps, ragged and chunked, with sequences joining and
leaving, equal separate unsplit forwards. An architecture that is not listed runs one forward per sequence, whole
prompts at once, with transformers' own cache, and forwards meet at the experts. So does a listed one if its
configuration uses an option that packed steps do not know, or makes that cache lose tokens that the masks show
(`why_apart`).
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from fiddler.errors import UnsupportedModelError
from fiddler.models.kv import Directness, SequenceKV, WaveCache
from fiddler.models.masks import Sight
from fiddler.models.seam import Forward

PACKED: frozenset[str] = frozenset(
    {
        "afmoe",
        "aria_text",
        "axk1",
        "beam",
        "cohere2_moe",
        "deepseek_ocr2_text",
        "deepseek_v2",
        "deepseek_v3",
        "dots1",
        "ernie4_5_moe",
        "ernie4_5_vl_moe_text",
        "exaone_moe",
        "flex_olmo",
        "flint",
        "gemma4_text",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe_text",
        "gpt_oss",
        "granitemoe",
        "granitemoe_swa",
        "granitemoeshared",
        "hunyuan_v1_moe",
        "hy_v3",
        "kolibri1",
        "laguna",
        "mellum",
        "mimo_v2_flash",
        "minimax_m2",
        "mistral4",
        "mixtral",
        "muse_spark_text",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_omni_moe_text",
        "qwen3_vl_moe_text",
        "solar_open",
    }
)
"""Model types of the text configuration."""


class DryStep(NamedTuple):
    """Results of a dry step."""

    past: Any
    """The sequence's past: a `SequenceKV` of a packed model, else transformers' cache."""
    layers: tuple[int, ...]
    """Layers whose experts were asked for, as they were bound, in order."""
    sights: Mapping[int, Sight]
    """By layer of a packed model, the tokens that its rows may see."""


def dry_step(model: torch.nn.Module, n_rows: int, *, packed: bool) -> DryStep:
    """Run `n_rows` tokens of one sequence, from its beginning, with experts that give zero.

    `model` is bound to the seam; its attention is ours if `packed`.
    """
    device = next(model.parameters()).device
    past: Any = SequenceKV() if packed else None
    cache = WaveCache([past], [n_rows], Directness(), 0) if packed else None
    ids = torch.zeros(1, n_rows, dtype=torch.int64, device=device)
    positions = torch.arange(n_rows, device=device)[None]

    # As in a real step: a prompt's rows want no logits, but for the last one's. Told as a number, some models drop
    # the other rows on the way.
    kept = {"logits_to_keep": torch.tensor([n_rows - 1], device=device)}
    extra = kept if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def call() -> Any:
        return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, **extra)

    forward = Forward(call)
    forward.wave = cache
    layers: list[int] = []
    try:
        outcome = forward.send()
        while not forward.dead:
            layers.append(outcome.layer)
            outcome = forward.send(outcome.hidden.new_zeros(outcome.hidden.shape))
    finally:
        forward.close()
    sights = cache.sights if cache is not None else {}
    return DryStep(past if packed else outcome.past_key_values, tuple(layers), sights)


def why_apart(model: PreTrainedModel) -> str:
    """Return why packed steps would not give what `generate` does, empty where they do; runs a row.

    `model` is bound to the seam and uses our attention. There are two reasons. A layer uses an option that our
    attention does not know, such as a mask that shows later tokens. Or transformers' cache drops the tokens behind
    a window while the masks still show them: a prompt then sees more than later tokens do, and only that cache
    gives the same result.
    """
    try:
        with torch.inference_mode():
            sights = dry_step(model, 1, packed=True).sights
        layers = DynamicCache(config=model.config).layers
    except UnsupportedModelError as error:
        return str(error)
    except Exception as error:  # of transformers' code: for options that do not go together, or without weights
        return "" if next(model.parameters()).is_meta else str(error)
    if not sights:
        return "the model attends by an attention of its own"
    differ = any(_differs(layers[i], sight) for i, sight in sights.items())
    return "transformers' cache forgets what masks show" if differ else ""


def check_runs(model: PreTrainedModel, why_apart: str = "") -> None:
    """Run a row of a model bound to the seam with transformers' attention and cache.

    Raises `UnsupportedModelError` for one that cannot run: its options do not go together. The reason against
    packed steps is often the better explanation.
    """
    try:
        with torch.inference_mode():
            dry_step(model, 1, packed=False)
    except Exception as error:
        reasons = [why_apart] * bool(why_apart) + [f"{type(error).__name__}: {error}"]
        raise UnsupportedModelError(
            f"{model.config.model_type!r} cannot run as config.json describes it: {'; '.join(reasons)}"
        ) from error


def _differs(layer: Any, sight: Sight) -> bool:
    """Whether a cache layer of transformers drops tokens that rows still see; with a window of 1 it keeps all."""
    if not getattr(layer, "is_sliding", False):  # one that shares another's keys does not even say
        return False
    limits = [limit for limit in (sight.window, sight.chunk) if limit]
    return layer.sliding_window == 1 or not limits or min(limits) > layer.sliding_window
