"""Experts in a GPU's slots, by path, shape and rows: how much of their weights the GPU reads a second."""

from collections.abc import Sequence
from itertools import cycle, islice, product
from typing import Any, NamedTuple, get_args

import torch

from bench import kernels
from bench.gpu.clock import Work, busy, spread, took
from bench.gpu.context import Context
from bench.gpu.device import TINY
from fiddler.devices.arena import Arena
from fiddler.formats.packed import Code, Packed
from fiddler.gpu.device import Gpu
from fiddler.gpu.slots import Method, Picked, SlotExperts
from fiddler.gpu.stack import Stack
from fiddler.gpu.visits import Visits
from fiddler.store.layout import BlockLayout
from fiddler.types import ExpertWeights

AT_ONCE = 8
"""Experts of a layer, as many as a token of Qwen3-30B-A3B visits."""
BUSY = 8192
"""Rows and columns of what the GPU multiplies while the host gets ahead."""


class Form(NamedTuple):
    """A way to quantise a matrix; GGUF's blocks have scales and their place in themselves."""

    code: Code
    scales: torch.dtype | None = None
    block: tuple[int, int] = (1, 1)
    zeros: bool = False

    def expert(self, hidden: int, intermediate: int) -> ExpertWeights:
        """Return a gated expert of random codes, gate and up as one matrix."""
        return ExpertWeights((self._matrix(2 * intermediate, hidden),), self._matrix(hidden, intermediate))

    def _matrix(self, out: int, columns: int) -> Packed:
        if self.scales is None:
            return self._in_blocks(out, columns)
        codes = torch.randint(0x70, (out, self.code.width(columns)), dtype=torch.uint8)
        grid = -(-out // self.block[0]), -(-columns // self.block[1])
        zeros = torch.full(grid, 8, dtype=torch.uint8) if self.zeros else None
        return Packed(
            self.code, codes, torch.ones(grid).to(self.scales), (out, columns), self.block, zeros, factor=0.01
        )

    def _in_blocks(self, out: int, columns: int) -> Packed:
        """Return blocks of small numbers: this byte twice is 0.0006 as float16."""
        assert self.code.run is not None
        codes = torch.full((out, self.code.width(columns)), 0x11, dtype=torch.uint8)
        return Packed(self.code, codes, None, (out, columns), (1, self.code.run.group))


FORMS = {
    "mxfp4": Form(Code.FP4, torch.float8_e8m0fnu, (1, 32)),
    "nvfp4": Form(Code.FP4, torch.float8_e4m3fn, (1, 16)),
    "int4": Form(Code.INT4, torch.bfloat16, (1, 128), zeros=True),
    "nf4": Form(Code.NF4, torch.float32, (1, 64)),
    "fp8": Form(Code.FP8, torch.float32, (128, 128)),
    "int8": Form(Code.INT8, torch.bfloat16, (1, 128)),
    **{f"gguf {code.value}": Form(code) for code in Code if code.run},
}


class Slots:
    """Slots full of experts of one shape; each run visits other ones, so that none comes from a cache."""

    def __init__(self, gpu: Gpu, shape: tuple[int, int], nbytes: int, form: "Form | None" = None) -> None:
        sample = kernels.expert(*shape) if form is None else form.expert(*shape)
        self.layout = BlockLayout.of(sample)
        self.expert_bytes, self.hidden = sample.nbytes, shape[0]
        n = max(AT_ONCE, -(-nbytes // self.layout.nbytes))
        self._gpu, arena = gpu, Arena(n, self.layout.nbytes, gpu.device)
        if form is None:
            arena.slots.view(torch.bfloat16).normal_(std=0.02)
        else:
            block = torch.empty(self.layout.nbytes, dtype=torch.uint8)
            self.layout.write(sample, block)
            arena.slots.copy_(block.to(gpu.device))
        self._stack = Stack.over(arena.slots, self.layout)
        self._step = n // AT_ONCE
        self._firsts = cycle(range(self._step))

    def run(self, path: Method, n_rows: int) -> Work:
        """Return runs of `AT_ONCE` experts of `n_rows` rows each, with everything that is not timed made before."""
        experts = SlotExperts(lambda _: self._stack, (kernels.SWIGLU,), path=path)
        firsts = islice(self._firsts, min(self._step, 16))
        # A layer's experts lie apart from each other.
        slots = [[first + i * self._step for i in range(AT_ONCE)] for first in firsts]
        visits = [visits_of(own, n_rows, self._gpu.device) for own in slots]
        hidden = torch.full((n_rows, self.hidden), 0.5, dtype=torch.bfloat16, device=self._gpu.device)
        out, turns = hidden.new_zeros(n_rows * AT_ONCE, self.hidden), cycle(visits)
        return lambda: experts.run(0, next(turns), hidden, out)


def visits_of(slots: Sequence[int], n_rows: int, device: torch.device) -> Visits:
    """Let each of `n_rows` rows visit the same slots, in ascending order."""
    n = len(slots)
    bounds = [i * n_rows for i in range(n + 1)]
    positions = [row * n + i for i in range(n) for row in range(n_rows)]

    def there(numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32).to(device)

    groups = tuple(zip(slots, bounds[:-1], bounds[1:], strict=True))
    return Visits(there(slots), there(bounds), there(positions), n_rows, len(positions), n, groups)


def paths(ctx: Context) -> list[dict[str, Any]]:
    """Measure every path; GB/s where launches are hidden behind other work, and seconds from rest."""
    found, gpu = list[dict[str, Any]](), ctx.gpu
    filler = busy(gpu, min(BUSY, ctx.sizes.gemm))
    for name, shape in ctx.sizes.shapes.items():
        slots = Slots(gpu, shape, ctx.sizes.slot_bytes)
        for n_rows in ctx.sizes.rows:
            for path in get_args(Picked):
                about = {"shape": name, "hidden": shape[0], "intermediate": shape[1]}
                row = {**about, "n_rows": n_rows, "path": path, "n_experts": AT_ONCE}
                found.append(row | _measured(ctx, slots, path, n_rows, filler))
        del slots
        gpu.reclaim()
    return found


def quantised(ctx: Context) -> list[dict[str, Any]]:
    """Measure quantised experts by format, on the path that an engine picks; GB/s are of packed bytes."""
    found, gpu = list[dict[str, Any]](), ctx.gpu
    filler = busy(gpu, min(BUSY, ctx.sizes.gemm))
    for (name, shape), (kind, form) in product(ctx.sizes.shapes.items(), FORMS.items()):
        slots = Slots(gpu, shape, ctx.sizes.slot_bytes, form)
        for n_rows in ctx.sizes.rows:
            row = {"shape": name, "format": kind, "n_rows": n_rows, "n_experts": AT_ONCE}
            found.append(row | _measured(ctx, slots, "auto", n_rows, filler))
        del slots
        gpu.reclaim()
    return found


def _measured(ctx: Context, slots: Slots, path: Method, n_rows: int, filler: Any) -> dict[str, Any]:
    gpu, passes = ctx.gpu, ctx.sizes.passes
    try:
        run = slots.run(path, n_rows)
        for _ in range(3):  # the first compiles
            took(gpu, gpu.main, run)
        hidden_s = [took(gpu, gpu.main, run, 4, before=filler) for _ in range(passes)]
        rest_s = [took(gpu, gpu.main, run) for _ in range(passes)]
    except Exception as error:  # a path that this GPU, or this torch, does not have
        return {"unavailable": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    nbytes = AT_ONCE * slots.expert_bytes
    return {"gbs": spread(nbytes / s / 1e9 for s in hidden_s), "from_rest_s": spread(rest_s)}


def launch(ctx: Context) -> dict[str, Any]:
    """Measure experts whose weights take no time, from rest; the best path counts."""
    slots, found = Slots(ctx.gpu, TINY, 1), dict[str, Any]()
    for path in get_args(Picked):
        measured = _measured(ctx, slots, path, 1, busy(ctx.gpu, 64))
        if "from_rest_s" in measured:
            found[path] = measured["from_rest_s"]["median"] / AT_ONCE
    return {"expert_s": min(found.values()), "by_path": found}
