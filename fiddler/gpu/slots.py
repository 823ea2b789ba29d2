"""Runs experts where they lie in the slots of a GPU's arena: no weights are gathered, and the host does not wait
for the GPU.

There are three paths. `triton` runs few rows in kernels of ours (triton_kernels.py). `grouped` runs many in torch's
grouped matmul, over all slots at once. `loop` runs one expert after the other, and works everywhere. Quantised
weights are decoded in the kernels' registers for few rows, and for many into a scratch (scratch.py).

Facts about `torch.nn.functional.grouped_mm` are from torch's `GroupedBlas.cpp`, `GroupMM.cu`, `GroupMMCommon.cuh`
and `GroupedMMUtils.h`; 2.11, the oldest torch that we admit, has the signature of 2.13 and the same headers. In
bfloat16, on compute capability 9 and 10, the GPU reads `offs`, and the call may be captured; everywhere else the
host waits for `offs` and loops (so also pytorch's issue 169970). Groups may be empty and lie anywhere; there are
fewer than 1024. Rows of either operand take multiples of 16 bytes; weights may be transposed. A bias is refused.
"""

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fiddler.devices.formula import DTYPES, ExpertFormula, run_expert
from fiddler.devices.kernels import linear
from fiddler.gpu.scratch import Decode, by_torch, run_decoded
from fiddler.gpu.stack import Stack
from fiddler.gpu.visits import MOST_GROUPS, Visits, windows

logger = logging.getLogger("fiddler")

Method = Literal["auto", "triton", "grouped", "loop"]
"""The ways to run experts; `auto` picks one of the others for each call."""
Picked = Literal["triton", "grouped", "loop"]

FEW_ROWS = 16
"""Rows of the largest group up to which `triton` is picked: one tile of its kernels, so that weights are read once.
Source: `TILE_ROWS` in triton_kernels.py. Torch's grouped kernels have tiles of 64 rows and more (`GroupMM.cu`)."""
TRITON_CAPABILITY = (8, 0)
"""CUDA compute capability of the oldest GPUs that Triton supports. Source: its README, "Compatibility"."""
GROUPED_CAPABILITIES = (9, 10)
"""Major ones, with a grouped kernel. Source: `_grouped_mm_cuda` in `GroupedBlas.cpp`."""


class Ability(NamedTuple):
    """The paths that a device can take."""

    device: str
    """torch's name for the type of device, such as "cuda", but "hip" for what only goes by that name."""
    capability: tuple[int, int] = (0, 0)
    """CUDA compute capability."""
    triton: bool = False
    """Whether Triton is there and has not failed yet."""

    @property
    def runs_triton(self) -> bool:
        """Whether kernels of Triton's run."""
        return self.device == "cuda" and self.triton and self.capability >= TRITON_CAPABILITY


def pick(most_rows: int, dtype: torch.dtype, ability: Ability, aligned: bool) -> Picked:
    """Return the path for a largest group of so many rows, and weights that a grouped matmul takes or not.

    How many rows there are in all does not matter, for time goes by the slots that are read, and once for each tile
    of rows. Nor does the formula: each path runs it.
    """
    if ability.device != "cuda" or dtype not in DTYPES.values():
        return "loop"
    if ability.runs_triton and most_rows <= FEW_ROWS:
        return "triton"
    if ability.capability[0] in GROUPED_CAPABILITIES and dtype == torch.bfloat16 and aligned:
        return "grouped"
    return "loop"


@lru_cache
def ability_of(device: torch.device) -> Ability:
    """Return a device's abilities; Triton counts as there until it fails."""
    if device.type != "cuda":
        return Ability(device.type)
    kind = "cuda" if torch.version.hip is None else "hip"
    return Ability(kind, torch.cuda.get_device_capability(device), triton=True)


class SlotExperts:
    """Runs experts from slots; belongs to the thread that queues work on the device, which is torch's current one.

    `stacks` gives a layer's weights; `formulas` are by layer. On "auto", Triton is given up for good once it fails,
    and this is logged. A forced `path` is for tests and calibration: whatever it raises is raised.
    """

    def __init__(
        self, stacks: Callable[[int], Stack], formulas: tuple[ExpertFormula, ...], *, path: Method = "auto"
    ) -> None:
        self._stacks = stacks
        self._formulas = formulas
        self._path = path
        self._swiglu: dict[int, bool] = {}
        self._triton_failed = False

    def run(self, layer: int, visits: Visits, hidden: Tensor, out: Tensor) -> None:
        """Write `out[position] = expert(hidden[position // top_k])` for each row, and no other row of `out`.

        `hidden` is `[T, H]`, `out` `[T * K, H]` with its columns side by side; both have the weights' dtype.

        It may be captured if the same call was run before. A replay reads weights, `hidden` and the tensors of
        `visits` anew; the numbers of `visits` stay those of the capture, and so do its `groups` unless the path is
        `triton`.
        """
        if visits.n_rows == 0:
            return
        stack = self._stacks(layer)
        path = self._pick(visits.most_rows, stack, hidden)
        if path == "triton":
            if self._run_triton(layer, stack, visits, hidden, out):
                return
            path = self._pick(visits.most_rows, stack, hidden)
        if stack.packed:
            self._run_decoded(layer, stack, visits, hidden, out, grouped=path == "grouped")
        else:
            (_run_grouped if path == "grouped" else _run_loop)(stack, self._formulas[layer], visits, hidden, out)

    def blind(self, layer: int, most_rows: int, hidden: Tensor) -> bool:
        """Whether `run` reads no row's place on the host, and leaves alone positions behind the last group."""
        picked = self._pick(most_rows, self._stacks(layer), hidden)
        return picked == "triton" and self._formulas[layer].post_norm is None

    def _pick(self, most_rows: int, stack: Stack, hidden: Tensor) -> Picked:
        if self._path != "auto":
            return self._path
        return pick(most_rows, hidden.dtype, self._ability(hidden.device), stack.aligned)

    def _ability(self, device: torch.device) -> Ability:
        ability = ability_of(device)
        return ability._replace(triton=False) if self._triton_failed else ability

    def _run_triton(self, layer: int, stack: Stack, visits: Visits, hidden: Tensor, out: Tensor) -> bool:
        """Return whether it worked; if not, rows may have been written."""
        formula = self._formulas[layer]
        if layer not in self._swiglu:
            self._swiglu[layer] = formula.is_swiglu
        swiglu = self._swiglu[layer]
        return self._try(lambda kernels: kernels.run(stack, formula, swiglu, visits, hidden, out), "triton_kernels")

    def _run_decoded(
        self, layer: int, stack: Stack, visits: Visits, hidden: Tensor, out: Tensor, *, grouped: bool
    ) -> None:
        def run(decode: Decode) -> None:
            formula = self._formulas[layer]
            run_decoded(stack, formula, visits, hidden, out, decode=decode, grouped=grouped)

        by_triton = self._path == "auto" and self._ability(hidden.device).runs_triton
        if not (by_triton and self._try(lambda kernels: run(kernels.decode), "triton_decode")):
            run(by_torch)

    def _try(self, run: Callable[[Any], None], module: str) -> bool:
        """Run something with a module of Triton's kernels; returns whether it worked."""
        try:
            run(import_module(f"fiddler.gpu.{module}"))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # not installed, no C compiler, an unknown GPU: each has an exception of its own
            if self._path == "triton":
                raise
            self._triton_failed = True
            logger.warning("experts on the GPU run without Triton: %s: %s", type(error).__name__, error)
            return False
        return True


def _run_loop(stack: Stack, formula: ExpertFormula, visits: Visits, hidden: Tensor, out: Tensor) -> None:
    positions = visits.positions.long()
    tokens = positions // visits.top_k
    for slot, start, stop in visits.groups:
        if start < stop:
            rows = hidden.index_select(0, tokens[start:stop])
            out.index_copy_(0, positions[start:stop], run_expert(formula, stack.of(slot), rows, linear, linear))


def _run_grouped(stack: Stack, formula: ExpertFormula, visits: Visits, hidden: Tensor, out: Tensor) -> None:
    positions, slots, counts = visits.positions.long(), visits.slots.long(), visits.bounds.diff()
    tokens = positions // visits.top_k
    ends = counts.new_zeros(stack.down.shape[0]).index_copy_(0, slots, counts).cumsum(0, dtype=torch.int32)
    # Told the size, torch does not ask the GPU for it (PyTorch, `torch.repeat_interleave`).
    row_slots = slots.repeat_interleave(counts, output_size=visits.n_rows)
    for window in windows(visits.groups, MOST_GROUPS):
        rows = slice(window.start, window.stop)
        offs = ends[window.first_slot : window.stop_slot] - window.start
        multiply = partial(_grouped_linear, offs, row_slots[rows] - window.first_slot)
        weights = stack.between(window.first_slot, window.stop_slot)
        x = hidden.index_select(0, tokens[rows])
        out.index_copy_(0, positions[rows], run_expert(formula, weights, x, multiply, multiply))


def _grouped_linear(offs: Tensor, groups: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `[R, out]` for `x` `[R, in]`, each row by its group's `weight` `[groups, out, in]` and `bias`.

    `offs` says where groups end, `groups` which one each row is of.
    """
    y: Tensor = F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=offs)
    return y if bias is None else y + bias.index_select(0, groups)
