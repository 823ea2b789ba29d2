"""The kernels: in Triton's interpreter where there is no GPU, and compiled for some that are not here."""

import os
import subprocess
import sys
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gpu.test_slots import DEVICE, KINDS, TOLERANCE, Kind, Layer, Sizes, exactly, kinds_with
from tests.support.covering import covering

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fiddler.gpu import triton_kernels
from fiddler.gpu.slots import FEW_ROWS
from fiddler.gpu.triton_kernels import LINE, TILE_ROWS, Tile, tile_of

INTERPRETED = DEVICE.type == "cpu"
COUNTS = {"one row": [1, 1, 0], "few rows": [2, 5, 0]}
"""By slot."""
SIZES = Sizes(11, 7, n_slots=3) if INTERPRETED else Sizes(300, 140, n_slots=3)
DTYPES = list(TOLERANCE)
create_dot = InterpreterBuilder.create_dot


def widened(handle: Any) -> Any:
    """bfloat16 as float32: the interpreter has it as the bits of integers, and would multiply those."""
    if handle.dtype != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def widen_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply bfloat16."""
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
    )


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, for the interpreter takes a while for each number it sums up, and products of bfloat16."""
    torch.manual_seed(0)
    if INTERPRETED:
        monkeypatch.setattr(triton_kernels, "tile_of", lambda most, weight: Tile(1 if most <= 1 else 4, 8, 8))
        widen_dots(monkeypatch)


@pytest.mark.parametrize(("kind", "dtype", "rows"), kinds_with(DTYPES, COUNTS, strength=3), ids=str)
@torch.inference_mode()
def test_equals_one_expert_at_a_time(kind: Kind, dtype: torch.dtype, rows: str) -> None:
    Layer.of(kind, SIZES, dtype).check("triton", COUNTS[rows])


@settings(max_examples=20)
@given(data=st.data())
def test_whatever_the_sizes_and_groups(data: st.DataObject) -> None:
    sizes = Sizes(
        hidden=data.draw(st.integers(1, 18)),
        inner=data.draw(st.integers(1, 18)),
        n_slots=data.draw(st.integers(1, 6)),
        top_k=data.draw(st.integers(1, 5)),
    )
    counts = data.draw(st.lists(st.sampled_from((0, 0, 1, 2, 5)), min_size=sizes.n_slots, max_size=sizes.n_slots))
    kind, dtype = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(DTYPES))
    Layer.of(kind, sizes, dtype, [slot for slot, count in enumerate(counts) if count]).check("triton", counts)


@pytest.mark.parametrize("counts", [[1], [TILE_ROWS + 1]], ids=["one row", "more than a tile"])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]], ids=str)
def test_with_tiles_as_a_gpu_has_them(kind: Kind, counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "tile_of", tile_of)
    Layer.of(kind, Sizes(70, 20, n_slots=1), torch.float16).check("triton", counts)


def test_gate_and_up_that_do_not_lie_alike() -> None:
    layer = Layer.of(next(kind for kind in KINDS if kind.split), SIZES, torch.float32)
    gate, up = layer.stack.up
    turned = up.transpose(1, 2).contiguous().transpose(1, 2)
    stack = triton_kernels.Stack((gate, turned), layer.stack.down)
    Layer(layer.kind, layer.sizes, layer.dtype, layer.experts, stack).check("triton", COUNTS["few rows"])


def test_a_swiglu_saturates_without_a_nan() -> None:
    layer = Layer.of(KINDS[0], SIZES, torch.float32)
    for scale in (80.0, 1e4):  # beyond 88, exp() is infinite in float32
        layer.stack.up[0].mul_(scale)
    weights = [exactly(layer.stack.of(slot)) for slot in range(SIZES.n_slots)]
    with np.errstate(over="ignore"):
        Layer(layer.kind, layer.sizes, layer.dtype, tuple(weights), layer.stack).check("triton", COUNTS["one row"])


@pytest.mark.parametrize(
    ("dtype", "transposed", "most_rows"), covering(DTYPES, (False, True), (1, 2, 16, 40)), ids=str
)
def test_a_tile_reads_whole_lines_and_little_at_a_time(
    dtype: torch.dtype, transposed: bool, most_rows: int
) -> None:
    weight = torch.empty(2, 256, 512, dtype=dtype)
    tile = tile_of(most_rows, weight.transpose(1, 2) if transposed else weight)
    assert tile.rows == (1 if most_rows == 1 else TILE_ROWS)
    assert FEW_ROWS == TILE_ROWS
    assert (tile.out if transposed else tile.inner) * dtype.itemsize % LINE == 0
    assert tile.out * tile.inner * dtype.itemsize <= 8 << 10
    assert all(size & (size - 1) == 0 for size in tile)


COMPILING = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from tests.gpu.test_slots import KINDS, Layer, Sizes, random_visits
from fiddler.gpu import triton_kernels as slot_triton

class Driver:
    # a GPU that can be compiled for, and is not there
    def __init__(self, capability):
        self.capability = capability
    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)
    def get_current_device(self):
        return self.capability
    def get_current_stream(self, device):
        return 0

class Compiled:
    # what compiles as a launch does, and launches nothing
    def __init__(self, kernel):
        self.kernel = kernel
        self.made = set()
    def __getitem__(self, grid):
        def launch(*arguments, **options):
            made = self.kernel.warmup(*arguments, grid=grid, **options)
            assert made.metadata.shared <= 99 << 10
            self.made.add(made.hash)
        return launch

slot_triton._multiply = compiled = Compiled(slot_triton._multiply)

def launch(kind, sizes, dtype, counts):
    layer = Layer.of(kind, sizes, dtype)
    visits = random_visits(counts, sizes.top_k)
    x = torch.zeros(64, sizes.hidden, dtype=dtype)
    out = torch.zeros(128, sizes.hidden, dtype=dtype)
    slot_triton.run(layer.stack, kind.formula, kind.formula.is_swiglu, visits, x, out)

for capability, dtype in ((80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float32)):
    triton.runtime.driver.set_active(Driver(capability))
    for counts in ([1, 1, 0], [3, 0, 1]):
        launch(KINDS[0], Sizes(64, 32, n_slots=3), dtype, counts)
launch(KINDS[-1], Sizes(9, 7, n_slots=3), torch.float16, [3, 1, 0])
n_made = len(compiled.made)
for counts in ([7, 9, 3], [0, 0, 2], [16, 16, 16]):
    for top_k in (1, 4):
        launch(KINDS[0], Sizes(64, 32, n_slots=3, top_k=top_k), torch.float32, counts)
assert len(compiled.made) == n_made, "other rows made other kernels"
"""


def test_compiles_for_gpus_and_not_anew_for_other_rows(tmp_path: File) -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", COMPILING],
        cwd=File(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
