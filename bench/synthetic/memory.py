"""A model of random weights straight in memory: nothing is read, nothing is written to disk.

All experts hold the same noise, each from another place in it. Nothing that is timed tells them from noise of their
own: every expert has bytes of its own to read and to copy, no value is likelier in one than in another, and no
memory or kernel that Fiddler meets makes use of what repeats megabytes apart. Their matrices differ in every row,
so an expert that is taken for another shows in the tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from math import gcd

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from bench import machine
from bench.synthetic.replayed import Replay
from bench.synthetic.shapes import Shape
from fiddler.config import EngineConfig, Resolved, resolve
from fiddler.devices.formula import DTYPES
from fiddler.engine.engine import Loader
from fiddler.engine.sim_assembly import SHARE
from fiddler.errors import ConfigError
from fiddler.models import attention, seam
from fiddler.models.loaded import ServableModel, experts_per_token, model_context
from fiddler.models.skeleton import meta_skeleton
from fiddler.recording import RoutingTrace
from fiddler.store.blocks import BlockStore
from fiddler.store.layout import BlockLayout
from fiddler.text.tokenizer import Text
from fiddler.types import ExpertWeights

SPARE_BYTES = 2 << 30
"""Left free beside the weights: keys and values, activations, whatever else runs."""
_GOLDEN = 0.618034
"""Multiples of it, less whole numbers, lie far apart however many there are (Knuth, "The art of computer
programming", volume 3, section 6.4)."""


def loader(shape: Shape, routing: RoutingTrace | None = None, *, seed: int = 0) -> Loader:
    """Return what an engine opens instead of a checkpoint: `Engine(loader(shape))`."""
    return lambda options: in_memory(shape, options, routing=routing, seed=seed)


def in_memory(
    shape: Shape, options: EngineConfig, *, routing: RoutingTrace | None = None, seed: int = 0
) -> ServableModel:
    """Make a model as `options` would have it opened; the same for the same seed.

    `routing` replaces its routers' choice. Only token ids are understood. Raises `ConfigError` where memory is too
    small, and for options and routing that do not fit the model.
    """
    config = shape.pretrained()
    resolved = resolve(
        replace(options, store="packed") if options.store == "auto" else options,
        checkpoint_dtype=str(shape.config["dtype"]),
        model_context=model_context(config),
        has_cuda=torch.cuda.is_available(),
    )
    if resolved.store != "packed":
        raise ConfigError(f"store={options.store!r}: a model made in memory has no file to map; leave store='auto'")
    dtype = DTYPES[resolved.dtype]
    model = _without_weights(config, dtype)
    experts = seam.find_experts(model)
    modules = list(experts.values())
    layouts = [BlockLayout.of(_sample(module, dtype, apart=shape.apart)) for module in modules]
    n_experts = tuple(int(module._shapes["down_proj"][0]) for module in modules)
    top_k = experts_per_token(config)
    replay = None if routing is None else Replay(routing, n_experts, top_k)
    block_bytes, n_slots = layouts[0].nbytes, _n_slots(resolved, options, sum(n_experts))
    dense_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    _check_memory(shape.name, dense_bytes, sum(n_experts) * block_bytes, n_slots * block_bytes)
    _fill_dense(model, seed)
    noise = Noise.of(layouts, n_experts, dtype, std=config.initializer_range, seed=seed)
    store = BlockStore.filled(layouts, n_experts, noise.fill)
    if replay is not None:
        replay.install(model, modules)
    return ServableModel(
        model=model,
        experts=experts,
        formulas=tuple(map(seam.formula, modules)),
        n_experts=n_experts,
        weights=store.weights,
        dtype=dtype,
        store=store,
        top_k=top_k,
        text=Text(None),
        resolved=resolved,
        packed=True,  # every shape is of an architecture that can
    )


@dataclass(frozen=True, slots=True)
class Noise:
    """One block of it, `[n]`, which fills all blocks: turned by another number of values for each."""

    values: Tensor
    firsts: tuple[int, ...]
    """By layer, how many experts come before its first."""

    @classmethod
    def of(
        cls,
        layouts: list[BlockLayout],
        n_experts: tuple[int, ...],
        dtype: torch.dtype,
        *,
        std: float,
        seed: int,
    ) -> "Noise":
        """Draw normal values for the largest block."""
        largest = max(layout.nbytes for layout in layouts)
        values = torch.empty(largest // dtype.itemsize, dtype=dtype)
        values.normal_(std=std, generator=torch.Generator().manual_seed(seed))
        return cls(values, tuple(accumulate(n_experts, initial=0)))

    def fill(self, layer: int, expert: int, block: Tensor) -> None:
        """Write a block, uint8 `[nbytes]`, and what lies between its parts."""
        values = block.view(self.values.dtype)
        n = len(values)
        start = (self.firsts[layer] + expert) * _step(n) % n
        values[: n - start] = self.values[start:n]
        values[n - start :] = self.values[:start]


def _step(n: int) -> int:
    """Return a number whose multiples differ, modulo `n`, until there are `n` of them."""
    step = int(_GOLDEN * n) | 1
    while gcd(step, n) > 1:
        step += 2
    return step


def _without_weights(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    config.dtype = dtype
    config._attn_implementation = attention.NAME
    config._experts_implementation = seam.NAME
    with _default_dtype(dtype):
        return meta_skeleton(None, config)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make parameters of a dtype, and leave buffers that ask for one of their own as they are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _fill_dense(model: PreTrainedModel, seed: int) -> None:
    """Make everything but the experts as transformers initialises it: normal values, norms at 1, rotary tables."""
    model.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialize_weights()
    model.eval().requires_grad_(False)


def _sample(module: seam.ExpertsModule, dtype: torch.dtype, *, apart: bool) -> ExpertWeights:
    """Return an expert without values, its parts in the shapes and order that a checkpoint has them in."""
    up, down = (
        torch.empty(module._shapes[n][1:], dtype=dtype, device="meta") for n in ("gate_up_proj", "down_proj")
    )
    return ExpertWeights(tuple(up.chunk(2)) if apart else (up,), down)


def _n_slots(resolved: Resolved, options: EngineConfig, n_experts: int) -> int:
    """Return the slots of a simulated accelerator, which are in the same memory."""
    if resolved.device != "sim":
        return 0
    return min(n_experts, round(n_experts * SHARE) if options.slots is None else options.slots)


def _check_memory(name: str, dense: int, experts: int, slots: int) -> None:
    """Raise `ConfigError`, before anything is allocated, for what would be ended half-way by the system."""
    free, taken = machine.free_bytes(), dense + experts + slots
    if taken + SPARE_BYTES > free:
        raise ConfigError(
            f"{name} takes {taken / 1e9:.1f} GB of memory ({experts / 1e9:.1f} of experts, {slots / 1e9:.1f} of "
            f"slots), {SPARE_BYTES / 1e9:.1f} must stay free, and {free / 1e9:.1f} are there: make fewer layers, "
            f"{name.partition(':')[0]}:layers=N"
        )
