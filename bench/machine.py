"""Where a measurement was taken: without this its numbers mean nothing."""

import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

import fiddler

ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
"""The instruction sets that decide how fast a bf16 expert can run."""

PEERS = ("accelerate", "gguf", "llama-cpp-python")
"""Packages that a comparison hangs on."""


def describe() -> dict[str, Any]:
    """Return the machine, the versions and the state a measurement ran in, ready for JSON."""
    cpu = _cpu_info()
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "n_cores": os.cpu_count(),
        "isa": [flag for flag in ISA_FLAGS if flag in cpu.get("flags", "").split()],
        "l3": _read("/sys/devices/system/cpu/cpu0/cache/index3/size"),
        "ram_gib": round(_memory("MemTotal") / 2**30, 1),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fiddler": fiddler.__version__,
        "peers": {name: _version(name) for name in PEERS},
        "threads": torch.get_num_threads(),
        "gpu": _gpu(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],
    }


def _gpu() -> dict[str, Any] | None:
    """Return what torch and `nvidia-smi` say of the GPU that torch uses; `None` where torch sees none."""
    if not torch.cuda.is_available():
        return None
    with suppress(RuntimeError, AssertionError):  # AssertionError is what a torch without CUDA raises
        known = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "name": known.name,
            "memory_gib": round(known.total_memory / 2**30, 1),
            "capability": f"{known.major}.{known.minor}",
            "cuda": torch.version.cuda,
            **_smi(str(getattr(known, "uuid", ""))),
        }
    return None


SMI_FIELDS = {
    "uuid": "",
    "driver_version": "driver",
    "pcie.link.gen.max": "pcie_generation",
    "pcie.link.width.max": "pcie_width",
    "pcie.link.gen.current": "pcie_generation_now",
}
"""What `nvidia-smi --query-gpu` is asked, and what that is called here. A GPU at rest may turn its link down."""


def _smi(uuid: str) -> dict[str, str | None]:
    """Return what `nvidia-smi` says of a GPU, all `None` where it says nothing."""
    names = list(SMI_FIELDS.values())[1:]
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(names)
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    rows = [row for row in rows if len(row) == len(SMI_FIELDS)]
    mine = [row for row in rows if uuid and uuid in row[0]] or (rows if len(rows) == 1 else [])
    return dict(zip(names, mine[0][1:], strict=True)) if mine else dict.fromkeys(names)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def free_bytes() -> int:
    """Return the memory that can be had without swapping."""
    return _memory("MemAvailable")


def _cpu_info() -> dict[str, str]:
    lines = _read("/proc/cpuinfo").partition("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _memory(name: str) -> int:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(file: str) -> str:
    try:
        return Path(file).read_text().strip()
    except OSError:
        return ""


def _commit() -> str:
    """Return the commit, marked where the tree differs from it; empty outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
