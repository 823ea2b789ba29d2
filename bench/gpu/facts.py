"""What the machine can do: the link, the host, the GPU, an engine's graphs. Each section fails alone."""

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.gpu import described, device, host, recording, slots
from bench.gpu.bounds import Rates
from bench.gpu.context import Context, said

Section = Callable[[Context], Any]
SECTIONS: Mapping[str, Section] = {
    "link": device.link,
    "host": host.host,
    "host_experts": host.experts,
    "dispatch": host.dispatch,
    "gpu": device.reading,
    "multiplying": device.multiplying,
    "launches": device.launches,
    "slot_experts": slots.paths,
    "slot_launch": slots.launch,
    "recording": recording.recording,
}
NEEDED = ("link", "host", "host_experts", "gpu", "slot_experts")
"""By `rates`."""


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
        described.write(file, described.figures(found, memory), ctx.gpu.name)
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
    """Return the rates that bounds go by, bytes a second; see `bench.gpu.bounds`."""
    # An expert's kernels may read faster than any of the plain ways: then they are the ceiling.
    gbs = {
        "cpu": max(found["host"]["read_gbs"], described.best(found["host_experts"])[0]),
        "link": found["link"]["to_gpu_gbs"]["high"],
        "gpu": max(found["gpu"]["read_gbs"], described.best(found["slot_experts"])[0]),
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
