"""The kernels of quantised experts fit the GPUs that they are for, at the sizes of real models."""

import json
import os
import subprocess
import sys
from pathlib import Path as File

import pytest

pytest.importorskip("triton")

CAPABILITIES = (80, 86, 89, 90, 120)
REGISTERS = {"one row": 168, "few rows": 255, "few rows of float32": 255, "decode": 128}
"""For each of a program's 128 threads, of the 65,536 that an SM has: 3, 2 and 4 programs at once (CUDA C++
Programming Guide, "Technical Specifications per Compute Capability")."""
STACK_BYTES = 16
"""More would be registers that went to memory."""
SHARED_BYTES = 48 << 10
"""So that two programs fit the 100 KiB of the smallest SM (ibid., 8.6, 8.9 and 12.0)."""
LOADS = {"nvfp4": 8, "gguf q4_k": 8, "gguf q5_k": 8}
"""Bytes that a thread reads at once, where they are not 16. GGUF's other blocks start anywhere: their codes come by
bytes, and the widest load is one of rows."""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_fit(capability: int, tmp_path: File) -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "tests.gpu.compiling", str(capability)],
        cwd=File(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(made) == 25 + 6 * 5
    for kernel in made:
        assert kernel["reg"] <= REGISTERS[kernel["what"]], kernel
        assert kernel["stack"] <= STACK_BYTES, kernel
        assert kernel["local"] == 0, kernel
        assert kernel["shared"] <= SHARED_BYTES, kernel
        # codes for one row come straight to registers, as many as have one scale
        if kernel["what"] == "one row":
            assert kernel["load"] == LOADS.get(kernel["form"], 4 if "gguf" in kernel["form"] else 16), kernel
