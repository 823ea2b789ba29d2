"""Which models are made: their published configurations, and a tiny one for tests."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from fiddler.lab.shape import ModelShape
from tools import synthesize

TINY: dict[str, Any] = synthesize.QWEN3 | {
    "head_dim": 16,
    "hidden_size": 64,
    "initializer_range": 0.15,  # among few dimensions 0.02 leaves nothing but the embedding
    "intermediate_size": 64,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
"""A made-up one with as many layers and experts as the demo model, whose recorded routing it can replay."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model to make."""

    name: str
    """As it was asked for."""
    config: Mapping[str, Any]
    """Its `config.json`."""
    apart: bool = False
    """Whether gate and up are two matrices: in Mixtral's files another tensor lies between them."""

    @property
    def sizes(self) -> ModelShape:
        """Layers, experts, and the bytes of both."""
        return ModelShape.from_config(self.config, self.name)

    def pretrained(self) -> PretrainedConfig:
        """Return the configuration as transformers has it, new for each model."""
        config: PretrainedConfig = CONFIG_MAPPING[self.config["model_type"]].from_dict(dict(self.config))
        config.name_or_path = self.name
        return config


SHAPES: dict[str, Shape] = {
    "mixtral-8x7b": Shape("mixtral-8x7b", synthesize.MIXTRAL, apart=True),
    "qwen3-30b-a3b": Shape("qwen3-30b-a3b", synthesize.QWEN3),
    "tiny": Shape("tiny", TINY),
}
"""By name; all their layers, and all of their vocabulary."""


def shape(spec: str) -> Shape:
    """Return the shape of `NAME[:layers=N]`: the first `N` layers, and their share of the vocabulary.

    Raises `ValueError` for a name or a number of layers that there is not.
    """
    name, n_layers = synthesize.parsed(spec, SHAPES)
    whole = SHAPES[name]
    n_published = whole.config["num_hidden_layers"]
    if n_layers is None:
        return whole
    if n_layers > n_published:
        raise ValueError(f"{spec!r}: {name} has {n_published} layers")
    return Shape(spec, synthesize.cut(whole.config, n_layers), whole.apart)
