"""Prints a simulation, as a table or as JSON."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isinf
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fiddler.cli.notes import copied_ahead, size
from fiddler.cost.model import LaneName
from fiddler.lab.machine import FIGURES, Machine, machines
from fiddler.lab.shape import ModelShape, shapes
from fiddler.lab.simulation import Report, Setting
from fiddler.lab.systems import SYSTEMS, System

LANES: Mapping[LaneName, str] = {"gpu": "GPU", "cpu": "CPU", "link": "link"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """A simulation: its input, and its report."""

    setting: Setting
    work: Mapping[str, Any]
    """The sequences, their lengths and their routing."""
    report: Report

    @property
    def resident(self) -> float:
        """The share of experts that the GPU holds."""
        return self.setting.n_slots / self.setting.shape.total_experts

    def as_json(self, *, sources: bool) -> dict[str, Any]:
        """Return everything; the source of each of the machine's figures if asked for."""
        setting = self.setting
        machine = {name: getattr(setting.machine, name) for name in ("name", "description", *sorted(FIGURES))}
        if sources:
            machine["sources"] = dict(setting.machine.sources)
        placement = {"n_slots": setting.n_slots, "system": setting.system.name, **asdict(setting.system)}
        del placement["name"]
        if isinf(setting.system.admission):
            placement["admission"] = None  # JSON has no infinity
        return {
            "clock": "virtual",
            "setting": {"model": setting.shape.name, "resident": self.resident, **placement, **self.work},
            "result": self.report.as_json(),
            "shape": asdict(setting.shape),
            "machine": machine,
        }

    def about(self) -> dict[str, str]:
        """Return what was run in three lines."""
        return {
            "title": f"{self.setting.shape.name} on {self.setting.machine.name}, in virtual time",
            "placement": f"{self._experts()}; {self._placement()}",
            "work": f"{self._work()}; {self.report.tokens_per_s:.3g} tokens/s",
        }

    def print(self, *, sources: bool) -> None:
        """Print it as a table; the machine's figures as well, if their sources are asked for."""
        console = Console(highlight=False)
        console.print(_table(self._rows()))
        if sources:
            console.print()
            console.print(_figures(self.setting.machine))

    def _rows(self) -> list[tuple[str, str]]:
        setting, report = self.setting, self.report
        return [
            ("model", f"{setting.shape.name}: {_describe(setting.shape)}"),
            ("machine", f"{setting.machine.name}: {setting.machine.description}"),
            ("in host memory", self._in_host()),
            ("on the GPU", self._experts()),
            ("placement", self._placement()),
            ("work", self._work()),
            ("", ""),
            ("speed", f"{report.tokens_per_s:.4g} tokens/s in virtual time: nothing was run"),
            ("first token", f"{report.first_token_s:.3g} s, of every sequence"),
            ("decoding", f"{report.decode_s:.3g} s for {report.n_decoded:,} tokens in {report.n_steps:,} steps"),
            *self._details(),
        ]

    def _details(self) -> list[tuple[str, str]]:
        report = self.report
        if not report.n_decoded:
            return []
        loads = max(report.n_hits + report.n_cpu + report.n_fetches, 1)
        hits, cpu, fetches = (_percent(n / loads) for n in (report.n_hits, report.n_cpu, report.n_fetches))
        tokens = report.n_decoded
        read = {lane: round(report.read_bytes[lane] / tokens) for lane in LANES}
        return [
            ("lanes busy", ", ".join(f"{LANES[lane]} {_percent(report.utilisation[lane])}" for lane in LANES)),
            ("experts read", ", ".join(f"{LANES[lane]} {size(n)}" for lane, n in read.items()) + " a token"),
            ("expert loads", f"{hits} hits, {cpu} on the CPU, {fetches} copied in first"),
            ("promotions", f"{report.n_promotions:,}, {report.n_promotions / tokens:.1f} a token"),
            ("copied ahead", copied_ahead(report.prefetch)),
            ("two waves", f"{report.n_steps_in_two_waves:,} of {report.n_steps:,} steps"),
            ("prediction", f"a layer's time is off by {_error(report.prediction_error)} in the median"),
            ("physical bound", self._bound()),
        ]

    def _bound(self) -> str:
        bound, report = self.report.bound, self.report
        longest = max((bound.gpu_s, "GPU"), (bound.cpu_s, "CPU"), (bound.link_s, "link"))[1]
        return (
            f"{bound.seconds:.3g} s of reading ({longest}), {_percent(report.of_bound)} of the time it took; "
            f"layers one after the other {_percent(report.of_chain)}"
        )

    def _experts(self) -> str:
        shape = self.setting.shape
        slots = self.setting.n_slots
        held = size(slots * shape.expert_bytes)
        return f"{slots:,} of {shape.total_experts:,} experts ({_percent(self.resident)}, {held})"

    def _in_host(self) -> str:
        every, there = (
            self.setting.shape.total_experts * self.setting.shape.expert_bytes,
            self.setting.machine.host_bytes,
        )
        more = "" if every <= there else ": more than there is; reading from disk is not simulated"
        return f"experts of {size(every)}, of {size(round(there))}{more}"

    def _placement(self) -> str:
        return f"{self.setting.system.name}: {_placement(self.setting.system)}"

    def _work(self) -> str:
        n, prompt, new = (self.work[name] for name in ("sequences", "prompt_tokens", "new_tokens"))
        sequences = "1 sequence" if n == 1 else f"{n:,} sequences"
        routing = f"routing {Path(self.work['routing']).stem}, seed {self.work['seed']}"
        return f"{sequences} of {prompt:,} prompt and {new:,} new tokens, {routing}"


def print_list() -> None:
    """Print the machines, shapes and systems there are, a line each."""
    console = Console(highlight=False)
    console.print("machines")
    console.print(_table([(name, Machine.load(name).description) for name in machines()]))
    console.print("\nshapes")
    console.print(_table([(name, _describe(ModelShape.load(name))) for name in shapes()]))
    console.print("\nsystems")
    console.print(_table([(name, _placement(placed)) for name, placed in SYSTEMS.items()]))


def _placement(placed: System) -> str:
    promote = "promotions" if placed.promote else "no promotions"
    overlap = "" if placed.overlap else ", CPU and GPU in turn"
    how = f"planner {placed.planner}, prefetch {placed.prefetch}, {promote}, waves {placed.waves}{overlap}"
    return f"policy {placed.policy}, {how}"


def _describe(shape: ModelShape) -> str:
    every = size(shape.total_experts * shape.expert_bytes)
    return (
        f"{shape.n_layers} layers of {shape.n_experts} experts, {shape.top_k} a token, "
        f"{size(shape.expert_bytes)} each in {shape.quant or 'floats'}, {every} in all"
    )


def _figures(machine: Machine) -> Table:
    table = _table([])
    for name in sorted(FIGURES):
        table.add_row(name, f"{getattr(machine, name):.4g}  {machine.sources.get(name, '')}")
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _error(share: float) -> str:
    return "less than 0.1 %" if share < 1e-3 else f"{100 * share:.1f} %"


def _table(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table
