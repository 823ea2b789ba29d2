"""Runs experts where they lie in the slots of a GPU's arena: no weights are gathered, and the host does not wait
for the GPU.

There are three paths. `triton` runs few rows in kernels of ours (triton_kernels.py). `grouped` runs many in torch's
grouped matmul, over all slots at once. `loop` runs one expert after the other, and works everywhere.

Facts about `torch.nn.functional.grouped_mm` are from torch's `GroupedBlas.cpp`, `GroupMM.cu`, `GroupMMCommon.cuh`
and `GroupedMMUtils.h`; 2.11, the oldest torch that we admit, has the signature of 2.13 and the same headers. In
bfloat16, on compute capability 9 and 10, the GPU reads `offs`, and the call may be captured; everywhere else the
host waits for `offs` and loops (so also pytorch's issue 169970). Groups may be empty and lie anywhere; there are
fewer than 1024. Rows of either operand take multiples of 16 bytes; weights may be transposed. A bias is refused.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fiddler.devices.formula import DTYPES, ExpertFormula, run_expert
from fiddler.devices.kernels import linear
from fiddler.gpu.stack import Stack

logger = logging.getLogger("fiddler")

Path = Literal["auto", "triton", "grouped", "loop"]
"""The ways to run experts; `auto` picks one of the others for each call."""
Picked = Literal["triton", "grouped", "loop"]

FEW_ROWS = 16
"""Rows of the largest group up to which `triton` is picked: one tile of its kernels, so that weights are read once.
Source: `TILE_ROWS` in triton_kernels.py. Torch's grouped kernels have tiles of 64 rows and more (`GroupMM.cu`)."""
MOST_GROUPS = 1023
"""Groups of one grouped matmul. Source: `group_count < 1024` in `GroupMM.cu`."""
TRITON_CAPABILITY = (8, 0)
"""CUDA compute capability of the oldest GPUs that Triton supports. Source: its README, "Compatibility"."""
GROUPED_CAPABILITIES = (9, 10)
"""Major ones, with a grouped kernel. Source: `_grouped_mm_cuda` in `GroupedBlas.cpp`."""


@dataclass(frozen=True, slots=True)
class Visits:
    """Rows of one layer, grouped by the slot that runs them. Slots ascend, each once; a group may be empty."""

    slots: Tensor
    """int32 `[G]`, on the device."""
    bounds: Tensor
    """int32 `[G + 1]`, from 0 to R: group g is `positions[bounds[g]:bounds[g + 1]]`."""
    positions: Tensor
    """int32 `[R]`, in the flattened `[T, K]` routing, each once; a row's token is `position // top_k`."""
    most_rows: int
    """Rows of the largest group."""
    n_rows: int
    """R, the number of rows."""
    top_k: int
    groups: tuple[tuple[int, int, int], ...]
    """(slot, start, stop) by group: the same as `slots` and `bounds`, for the host. `triton` does not read it."""


class Ability(NamedTuple):
    """The paths that a device can take."""

    device: str
    """torch's name for the type of device, such as "cuda", but "hip" for what only goes by that name."""
    capability: tuple[int, int] = (0, 0)
    """CUDA compute capability."""
    triton: bool = False
    """Whether Triton is there and has not failed yet."""


def pick(most_rows: int, dtype: torch.dtype, ability: Ability, aligned: bool) -> Picked:
    """Return the path for a largest group of so many rows, and weights that a grouped matmul takes or not.

    How many rows there are in all does not matter, for time goes by the slots that are read, and once for each tile
    of rows. Nor does the formula: each path runs it.
    """
    if ability.device != "cuda" or dtype not in DTYPES.values():
        return "loop"
    if ability.triton and ability.capability >= TRITON_CAPABILITY and most_rows <= FEW_ROWS:
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
        self, stacks: Callable[[int], Stack], formulas: tuple[ExpertFormula, ...], *, path: Path = "auto"
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
        stack, formula = self._stacks(layer), self._formulas[layer]
        path = self._pick(visits.most_rows, stack, hidden)
        if path == "triton":
            if self._run_triton(layer, stack, visits, hidden, out):
                return
            path = self._pick(visits.most_rows, stack, hidden)
        (_run_grouped if path == "grouped" else _run_loop)(stack, formula, visits, hidden, out)

    def blind(self, layer: int, most_rows: int, hidden: Tensor) -> bool:
        """Whether `run` reads no row's place on the host, and leaves alone positions behind the last group."""
        picked = self._pick(most_rows, self._stacks(layer), hidden)
        return picked == "triton" and self._formulas[layer].post_norm is None

    def _pick(self, most_rows: int, stack: Stack, hidden: Tensor) -> Picked:
        if self._path != "auto":
            return self._path
        ability = ability_of(hidden.device)
        if self._triton_failed:
            ability = ability._replace(triton=False)
        return pick(most_rows, hidden.dtype, ability, stack.aligned)

    def _run_triton(self, layer: int, stack: Stack, visits: Visits, hidden: Tensor, out: Tensor) -> bool:
        """Return whether it worked; if not, rows may have been written."""
        formula = self._formulas[layer]
        if layer not in self._swiglu:
            self._swiglu[layer] = formula.is_swiglu
        try:
            kernels: Any = import_module("fiddler.gpu.triton_kernels")
            kernels.run(stack, formula, self._swiglu[layer], visits, hidden, out)
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


class Window(NamedTuple):
    """Neighbouring slots and the rows that they run."""

    first_slot: int
    stop_slot: int
    start: int
    stop: int


def windows(groups: Sequence[tuple[int, int, int]], most_slots: int) -> Iterator[Window]:
    """Yield windows of at most so many slots that hold all groups, (slot, start, stop) each, but for empty ones."""
    window: Window | None = None
    for slot, start, stop in groups:
        if start == stop:
            continue
        if window is not None and slot < window.first_slot + most_slots:
            window = window._replace(stop_slot=slot + 1, stop=stop)
            continue
        if window is not None:
            yield window
        window = Window(slot, slot + 1, start, stop)
    if window is not None:
        yield window
