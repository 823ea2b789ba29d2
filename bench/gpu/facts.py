"""What the machine can do: the link, the host, the GPU, an engine's graphs. Each section fails alone."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import torch

from bench import machine
from bench.gpu import device, slots
from bench.gpu.context import Context, said
from bench.gpu.models import sizes_of, vocabulary
from bench.gpu.running import prompts, read
from fiddler import Engine
from fiddler.lab.machine import Machine

N_NEW = 12
"""Tokens: the first step of a kind runs as the model's code does, the second is recorded, others replay it."""


def recorded(ctx: Context) -> dict[str, Any]:
    """Open a model of a few layers, decode, and say what was recorded and what was calibrated."""
    found = anyio.run(_decode, ctx)
    ctx.shelf.tidy()
    return {"model": ctx.sizes.few, "records": bool(found["n_pieces"]) and not found["why_not"], **found}


async def _decode(ctx: Context) -> dict[str, Any]:
    spec = ctx.sizes.few
    # Half of the experts in slots: a step is a piece for every layer, as where a model does not fit.
    n_slots = max(1, sizes_of(spec).total_experts // 2)
    async with Engine(ctx.shelf.loader(spec), ctx.engine(slots=n_slots)) as engine:
        for n in (1, 4):
            await read(engine, prompts(n, ctx.sizes.n_prompt, vocabulary(spec), n), N_NEW, ctx.sizes.patience_s)
        assert engine._loop is not None
        side: Any = engine._loop._rig.side
        costs = side.costs
        return {
            "n_pieces": [] if side.graphs is None else [len(r.segments) for r in side.graphs.kinds.values() if r],
            "why_not": "nothing is recorded for this model" if side.graphs is None else side.graphs.why_not,
            "n_slots": n_slots,
            "cpu_slowdown_beside_link": costs.contention.cpu,
            "link_slowdown_beside_cpu": costs.contention.link,
            "host_layer_s": costs.host_s,
            "move_fixed_s": costs.moves.fixed_s,
            "move_row_s": costs.moves.row_s,
            "dense_layer_s": costs.dense.rows(1),
            "head_s": costs.dense.head(1),
            "copy_s": costs.experts[0].copy_s,
            "expert_bytes": costs.experts[0].nbytes,
        }


Section = Callable[[Context], Any]
SECTIONS: Mapping[str, Section] = {
    "link": device.link,
    "host": device.host,
    "host_experts": device.experts,
    "dispatch": device.dispatch,
    "decoding": device.decoding,
    "gpu": device.reading,
    "multiplying": device.multiplying,
    "launches": device.launches,
    "slot_experts": slots.paths,
    "slot_quantised": slots.quantised,
    "slot_launch": slots.launch,
    "recording": recorded,
}


@dataclass(frozen=True, slots=True)
class Rates:
    """What bounds go by, bytes a second."""

    cpu: float
    link: float
    gpu: float


NEEDED = ("link", "host", "host_experts", "gpu", "slot_experts")
"""By `rates`."""


Figure = tuple[float, str]
"""A value, and how it was measured."""
FEW_ROWS = 4
"""Experts of up to so many rows are bound by their weights."""

LEAST_DECODING = 0.01
"""Least share of a packed expert's time that counts as decoding: none would be an endless rate."""


def facts(ctx: Context) -> dict[str, Any]:
    """Measure every section, and write the machine description where all that it needs was measured."""
    found = _sections(ctx, SECTIONS)
    try:
        found["rates"] = _rates(found)
        for row in found["host_experts"]:
            row["of_ceiling"] = row["gbs"]["median"] / found["rates"]["cpu"] * 1e9
        host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = {"gpu": ctx.gpu.memory().total, "host": host_bytes}
        file = ctx.beside / f"machine-{ctx.label}.json"
        write_machine(file, figures(found, memory), ctx.gpu.name)
        found["machine_file"] = f"{ctx.beside.name}/{file.name}"
    except Exception as error:  # whatever is missing, what there is counts
        found["failed"] = {**found.get("failed", {}), "machine": said(error)}
    return found


def _sections(ctx: Context, asked: Mapping[str, Section]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, measure in asked.items():
        try:
            with torch.inference_mode():
                found[name] = measure(ctx)
        except Exception as error:  # the others are worth having without it
            traceback.print_exc(file=sys.stderr)
            found["failed"] = {**found.get("failed", {}), name: said(error)}
        ctx.gpu.reclaim()
        ctx.keep("facts", **found)
    return found


def _rates(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the rates that bounds go by, bytes a second."""
    # An expert's kernels may read faster than any of the plain ways: then they are the ceiling.
    gbs = {
        "cpu": max(found["host"]["read_gbs"], best(found["host_experts"])[0]),
        "link": found["link"]["to_gpu_gbs"]["high"],
        "gpu": max(found["gpu"]["read_gbs"], best(found["slot_experts"])[0]),
    }
    return {reader: 1e9 * rate for reader, rate in gbs.items()}


def rates_of(ctx: Context) -> Rates:
    """Return the rates that a run before has found on this machine, or measure them now."""
    known = ctx.known("facts")
    if known is None or "rates" not in known:
        found = _sections(ctx, {name: SECTIONS[name] for name in NEEDED})
        ctx.keep("facts", rates=_rates(found))
        known = ctx.known("facts")
    assert known is not None
    return Rates(**known["rates"])


def figures(found: Mapping[str, Any], memory: Mapping[str, int]) -> dict[str, Figure]:
    """Return a machine's figures.

    Raises `KeyError` for a section that is missing, or `ValueError` for an empty one.
    """
    link, recording = found["link"], found["recording"]
    launch = found["launches"]["graph"]
    calibrated = f"the engine's calibration of {recording['model']}"
    n_kernels = found["launches"]["n_kernels_of_graph"]
    cpu, gpu = best(found["host_experts"]), best(found["slot_experts"])
    return {
        "cpu_read_bytes_per_s": (cpu[0] * 1e9, f"whole experts on the host, {cpu[1]}"),
        "cpu_flop_per_s": (found["host"]["flop_per_s"], "the best pass of a large bf16 product"),
        "cpu_decode_weights_per_s": (
            decoding_rate(found["decoding"], cpu[0] * 1e9),
            f"one row of packed experts on the host ({device.PACKED}), beyond reading them",
        ),
        "link_bytes_per_s": (link["to_gpu_gbs"]["median"] * 1e9, "copies from pinned memory, alone"),
        "cpu_slowdown_beside_link": (recording["cpu_slowdown_beside_link"], calibrated),
        "link_slowdown_beside_cpu": (recording["link_slowdown_beside_cpu"], calibrated),
        "gpu_read_bytes_per_s": (gpu[0] * 1e9, f"experts in slots, {gpu[1]}"),
        "gpu_flop_per_s": (found["multiplying"]["flop_per_s"], "the best pass of a large bf16 product"),
        "gpu_bytes": (float(memory["gpu"]), "what the driver says of all of it"),
        "host_bytes": (float(memory["host"]), "what the system says of all of it"),
        "gpu_expert_launch_s": (
            found["slot_launch"]["expert_s"],
            "tiny experts in slots, from rest, by the best path",
        ),
        "cpu_expert_dispatch_s": (found["dispatch"]["expert_s"], "tiny experts on the host"),
        "dense_launch_s": (
            max(launch["gpu_s"], launch["host_s"]),
            f"replays of a graph of {n_kernels} small kernels, one behind the other",
        ),
        "host_layer_s": (recording["host_layer_s"], calibrated),
        "move_fixed_s": (recording["move_fixed_s"], calibrated),
    }


def decoding_rate(packed: Mapping[str, float], read_bytes_per_s: float) -> float:
    """Return the weights decoded a second, by an expert's time beyond reading it, or a least share of it."""
    beyond_s = packed["expert_s"] - packed["nbytes"] / read_bytes_per_s
    return packed["n_weights"] / max(beyond_s, LEAST_DECODING * packed["expert_s"])


def best(rows: list[Mapping[str, Any]]) -> tuple[float, str]:
    """Return the highest median GB/s of experts with few rows, and whose it is. Raises `ValueError` without any."""
    few = [row for row in rows if row.get("gbs") and row["n_rows"] <= FEW_ROWS]
    if not few:
        raise ValueError(f"no experts of at most {FEW_ROWS} rows were measured")
    row = max(few, key=lambda row: row["gbs"]["median"])
    path = f", path {row['path']}" if "path" in row else ""
    return row["gbs"]["median"], f"the best of few rows: {row['shape']}, {row['n_rows']} rows{path}"


def write_machine(file: Path, found: Mapping[str, Figure], gpu_name: str) -> Machine:
    """Write the description, and read it back as the simulator does. Raises `ConfigError` for what it refuses."""
    about = machine.describe()
    where = f"measured by bench.gpu at {about['commit'] or 'no commit'}, {about['date']}"
    value: dict[str, Any] = {
        "description": f"{gpu_name}, {about['cpu'] or 'an unnamed CPU'} with {about['n_cores']} cores, as measured",
        **{name: {"value": figure, "source": f"measured: {how}; {where}"} for name, (figure, how) in found.items()},
    }
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return Machine.load(file)
