"""What was measured, as a machine description that `fiddler simulate` takes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import machine
from fiddler.cost.machine import Machine

Figure = tuple[float, str]
"""A value, and how it was measured."""
FEW_ROWS = 4
"""Experts of up to so many rows are bound by their weights."""


def figures(facts: Mapping[str, Any], memory: Mapping[str, int]) -> dict[str, Figure]:
    """Return a machine's figures.

    Raises `KeyError` for a section that `facts` lacks, or `ValueError` for an empty one.
    """
    link, recording = facts["link"], facts["recording"]
    launch = facts["launches"]["graph"]
    calibrated = f"the engine's calibration of {recording['model']}"
    n_kernels = facts["launches"]["n_kernels_of_graph"]
    cpu, gpu = best(facts["host_experts"]), best(facts["slot_experts"])
    return {
        "cpu_read_bytes_per_s": (cpu[0] * 1e9, f"whole experts on the host, {cpu[1]}"),
        "cpu_flop_per_s": (facts["host"]["flop_per_s"], "the best pass of a large bf16 product"),
        "link_bytes_per_s": (link["to_gpu_gbs"]["median"] * 1e9, "copies from pinned memory, alone"),
        "cpu_slowdown_beside_link": (recording["cpu_slowdown_beside_link"], calibrated),
        "link_slowdown_beside_cpu": (recording["link_slowdown_beside_cpu"], calibrated),
        "gpu_read_bytes_per_s": (gpu[0] * 1e9, f"experts in slots, {gpu[1]}"),
        "gpu_flop_per_s": (facts["multiplying"]["flop_per_s"], "the best pass of a large bf16 product"),
        "gpu_bytes": (float(memory["gpu"]), "what the driver says of all of it"),
        "host_bytes": (float(memory["host"]), "what the system says of all of it"),
        "gpu_expert_launch_s": (
            facts["slot_launch"]["expert_s"],
            "tiny experts in slots, from rest, by the best path",
        ),
        "cpu_expert_dispatch_s": (facts["dispatch"]["expert_s"], "tiny experts on the host"),
        "dense_launch_s": (
            max(launch["gpu_s"], launch["host_s"]),
            f"replays of a graph of {n_kernels} small kernels, one behind the other",
        ),
        "host_layer_s": (recording["host_layer_s"], calibrated),
        "move_fixed_s": (recording["move_fixed_s"], calibrated),
    }


def best(rows: list[Mapping[str, Any]]) -> tuple[float, str]:
    """Return the highest median GB/s of experts with few rows, and whose it is. Raises `ValueError` without any."""
    few = [row for row in rows if row.get("gbs") and row["n_rows"] <= FEW_ROWS]
    if not few:
        raise ValueError(f"no experts of at most {FEW_ROWS} rows were measured")
    row = max(few, key=lambda row: row["gbs"]["median"])
    path = f", path {row['path']}" if "path" in row else ""
    return row["gbs"]["median"], f"the best of few rows: {row['shape']}, {row['n_rows']} rows{path}"


def write(file: Path, found: Mapping[str, Figure], gpu_name: str) -> Machine:
    """Write the description, and read it back as the simulator does. Raises `ConfigError` for what it refuses."""
    about = machine.describe()
    where = f"measured by bench.gpu at {about['commit'] or 'no commit'}, {about['date']}"
    value: dict[str, Any] = {
        "description": f"{gpu_name}, {about['cpu'] or 'an unnamed CPU'} with {about['n_cores']} cores, as measured",
        **{name: {"value": figure, "source": f"measured: {how}; {where}"} for name, (figure, how) in found.items()},
    }
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return Machine.load(file)
