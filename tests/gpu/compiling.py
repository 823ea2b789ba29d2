"""Compiles the kernels of quantised experts for a GPU that is not here: `python -m tests.gpu.compiling 90`.

Writes a line of JSON for each: what it is, the registers, stack and shared memory that it takes, and the
bytes of its widest load.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from fiddler.formats.packed import Code
from fiddler.gpu import triton_decode, triton_kernels, triton_packed
from fiddler.gpu.stack import PackedStack, Stack
from fiddler.gpu.triton_tiles import Matrix
from fiddler.store.layout import BlockLayout
from fiddler.types import ExpertWeights
from tests.gpu.quantised import IN_BLOCKS, WHOLE, Quantisation
from tests.gpu.test_slots import random_visits

FORMS = {
    "mxfp4": Quantisation(Code.FP4, torch.float8_e8m0fnu, block=(1, 32)),
    "nvfp4": Quantisation(Code.FP4, torch.float8_e4m3fn, block=(1, 16)),
    "int4": Quantisation(Code.INT4, torch.bfloat16, True, (1, 128)),
    "nf4": Quantisation(Code.NF4, torch.float32, block=(1, 64)),
    "fp8": Quantisation(Code.FP8, torch.float32, block=(128, 128)),
    "int8": Quantisation(Code.INT8, torch.bfloat16, block=(1, WHOLE)),
    **{f"gguf {each}": each for each in IN_BLOCKS},
}
QWEN3, GPT_OSS, LARGE = (768, 2048), (2880, 2880), (2880, 2816)
"""(out, in) of a gate or up; the last for GGUF's blocks, of which the large ones do not fill gpt-oss's rows."""
ONE, FEW, OTHERS = [1, 1], [3, 2], [9, 16]


class Driver:
    """A GPU that can be compiled for, and is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """A kernel that is compiled as a launch does, and not launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.latest: Any = None

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.latest = self.kernel.warmup(*arguments, grid=grid, **options)

        return launch


def in_slots(form: Quantisation, shape: tuple[int, int]) -> tuple[PackedStack, PackedStack]:
    """Return a gate and an up of a shape, in slots as an engine has them."""
    gate, up = form.matrix(*shape), form.matrix(*shape)
    layout = BlockLayout.of(ExpertWeights((gate, up), gate))
    first, second = Stack.over(torch.zeros(2, layout.nbytes, dtype=torch.uint8), layout).up
    assert isinstance(first, PackedStack)
    assert isinstance(second, PackedStack)
    return first, second


def used(made: Any) -> dict[str, int]:
    """Return what a compiled kernel takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    wide = max(map(int, re.findall(r"ld\.global\S*\.v(\d)\.b32", made.asm["ptx"])), default=1)
    return {**found, "shared": made.metadata.shared, "load": 4 * wide}


def main(capability: int) -> None:
    triton.runtime.driver.set_active(Driver(capability))
    with_scales = triton_packed._multiply_packed = Compiled(triton_packed._multiply_packed)
    with_blocks = triton_kernels._multiply = Compiled(triton_kernels._multiply)
    decode = triton_decode._decode = Compiled(triton_decode._decode)
    decode_blocks = triton_decode._decode_blocks = Compiled(triton_decode._decode_blocks)

    def compiled(form: str, shape: tuple[int, int], counts: list[int], dtype: torch.dtype, *, twin: bool) -> Any:
        gate, up = in_slots(FORMS[form], shape)
        x, out = (torch.zeros(64, n, dtype=dtype) for n in (shape[1], shape[0]))
        matrix = Matrix(gate, up if twin else None, None, None)
        triton_kernels._launch(x, matrix, out, random_visits(counts, 1), gather=True)
        return (with_blocks if FORMS[form].scales is None else with_scales).latest

    def decoded(form: str, shape: tuple[int, int]) -> Any:
        matrix, slots = in_slots(FORMS[form], shape)[0], torch.zeros(2, dtype=torch.int32)
        triton_decode.decode(matrix, slots, (0, 0), torch.bfloat16)
        return (decode_blocks if FORMS[form].scales is None else decode).latest

    def report(made: Any, form: str, what: str) -> None:
        print(json.dumps({"form": form, "what": what, **used(made)}))

    for form, quantisation in FORMS.items():
        large = LARGE if quantisation.scales is None else GPT_OSS
        report(compiled(form, QWEN3, ONE, torch.bfloat16, twin=True), form, "one row")
        few = compiled(form, QWEN3, FEW, torch.bfloat16, twin=True)
        report(few, form, "few rows")
        report(compiled(form, large, FEW, torch.bfloat16, twin=False), form, "few rows")
        report(decoded(form, large), form, "decode")
        if quantisation.scales is None or form == "int4":
            report(compiled(form, QWEN3, FEW, torch.float32, twin=True), form, "few rows of float32")
        if form in ("int8", "gguf q6_k"):
            other = compiled(form, QWEN3, OTHERS, torch.bfloat16, twin=True)
            assert few.hash == other.hash, "other rows, another kernel"


if __name__ == "__main__":
    main(int(sys.argv[1]))
