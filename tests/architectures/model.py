"""Tiny random models that make text, and what their caches say about them."""

import math

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .catalogue import architectures
from .config import EXPERTS, tiny_config

# With unit weights attention is so even that different texts end in the same few tokens.
GAIN = 2.0


def build(name: str, seed: int = 0, *, varied: bool = False) -> PreTrainedModel:
    """Architecture `name` as a tiny random model in fp32 and eval mode, the same for the same seed.

    Its config is the default one, made small, or, `varied`, another one that departs from it in many options.

    Attention and experts run eagerly, and no token ends a text: `generate` is greedy and never stops early.
    """
    architecture = architectures()[name]
    model_class = architecture.model_class()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(tiny_config(architecture.package, model_class, varied=varied))
        _randomize(model)
    model.generation_config = GenerationConfig.from_dict({"do_sample": False})
    model.train(False)
    return model


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Spread the weights: after the default initialisation every token has nearly the same logit."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not name.endswith("bias"):
            parameter.normal_(std=GAIN / math.sqrt(_fan_in(model, name, parameter)))
        elif not parameter.any() and not name.endswith(("bias", "weight", "scale")):
            # Zero switches it off: a temperature, an attention sink, a query. (A scale grows with the position.)
            parameter.normal_(std=GAIN)
        else:
            _disturb(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):
            _disturb(buffer)
        elif name.endswith("tid2eid"):
            # A table from tokens to their experts, zeros by default: distinct experts for each token.
            buffer.copy_(torch.rand(len(buffer), EXPERTS).topk(buffer.shape[1]).indices)


def _disturb(tensor: torch.Tensor) -> None:
    tensor.add_(torch.empty_like(tensor).uniform_(-0.05, 0.05))


def _fan_in(model: nn.Module, name: str, parameter: nn.Parameter) -> int:
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.Embedding):
        # Small beside what the layers add: a model whose head is tied to it would repeat its last token.
        return 16 * parameter.shape[-1]
    if isinstance(owner, nn.Conv1d):
        return parameter[0].numel()
    return parameter.shape[1 if getattr(owner, "is_transposed", False) else -1]


@torch.inference_mode()
def stateful(model: PreTrainedModel) -> bool:
    """Whether the cache holds more than keys and values: recurrent or convolution state, indexers, ..."""
    cache = model(torch.arange(1, 4)[None], use_cache=True).past_key_values
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is not DynamicCache or any(type(layer) not in plain for layer in cache.layers)
