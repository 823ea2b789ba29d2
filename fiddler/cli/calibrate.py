"""`fiddler calibrate`: measures a model's experts on this machine, in seconds, and stores the result."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fiddler.cli.notes import Notes, size
from fiddler.cli.options import CheckpointOptions, choice
from fiddler.cli.terminal import guarded
from fiddler.config import EngineConfig, ExpertDtype
from fiddler.errors import ConfigError

if TYPE_CHECKING:
    from fiddler.calibration.costs import Calibration, HeldOut
    from fiddler.cost.model import CostModel, ExpertCosts


_DEVICES = ("cpu", "sim", "cuda")


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """What to measure, and how to print the result."""

    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="cpu|sim|cuda",
            help="sim also measures slots, copies and contention; cuda does so on the GPU, with its dense part.",
        ),
    ] = "cpu"
    expert_dtype: Annotated[
        str, choice(ExpertDtype, "How the engine keeps experts, if not as the checkpoint does.", "Options")
    ] = "checkpoint"
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads.", min=1)] = None
    anew: Annotated[bool, typer.Option("--anew", help="Measure even if it is stored.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False

    def config(self, checkpoint: CheckpointOptions) -> EngineConfig:
        """Return the engine's configuration. Raises `ConfigError`."""
        if self.device not in _DEVICES:
            raise ConfigError(f"device={self.device!r} cannot be measured; known: {', '.join(_DEVICES)}")
        given = {"device": self.device, "expert_dtype": self.expert_dtype, "threads": self.threads}
        return EngineConfig.from_mapping({**given, "trust_remote_code": checkpoint.trust_remote_code})


def calibrate(checkpoint: CheckpointOptions, options: CalibrateOptions) -> None:
    """Measure what a model's experts take on this machine, and store it for engines with an accelerator.

    Takes seconds, and reads few of the model's experts; what is stored already is shown. An engine on the CPU alone
    has nothing to choose and uses the calibration of its kernels only.
    """
    notes = Notes(quiet=options.as_json)
    with guarded():
        config = options.config(checkpoint)
        with notes.working(f"measuring the experts of {checkpoint.name}", spin=checkpoint.is_local):
            checkpoint.find()
            from fiddler.calibration.costs import calibrate as measure
            from fiddler.calibration.sample import open_bench, open_experts

            experts = open_experts(checkpoint.source, config)
            with open_bench(experts, config) as bench:
                began = perf_counter()
                found = measure(bench, experts, config, anew=options.anew)
                took_s = perf_counter() - began
        if options.as_json:
            print(json.dumps(_as_json(checkpoint, options, found)))
        else:
            _print(found, took_s)


def _as_json(checkpoint: CheckpointOptions, options: CalibrateOptions, found: "Calibration") -> dict[str, Any]:
    return {
        "model": str(checkpoint.source),
        "device": options.device,
        "file": str(found.file) if found.file.is_file() else None,
        "measured_now": found.fresh,
        "costs": found.costs.as_json(),
        "held_out": [{**asdict(held_out), "error": held_out.error} for held_out in found.held_out],
    }


def _print(found: "Calibration", took_s: float) -> None:
    console = Console(highlight=False)
    costs = found.costs
    for number, experts in enumerate(dict.fromkeys(costs.experts)):
        layers = costs.experts.count(experts)
        console.print(f"experts of {size(experts.nbytes)}, in {layers} layer{'s' * (layers > 1)}")
        console.print(_table(experts, [held_out for held_out in found.held_out if held_out.shape == number]))
        console.print()
    console.print(_summary(found, took_s))
    stored = "stored in" if found.file.is_file() else "not stored: cannot write"
    console.print(f"{stored} {found.file}", soft_wrap=True)


def _table(experts: "ExpertCosts", held_out: list["HeldOut"]) -> Table:
    """Return an expert's seconds by rows; at row counts in brackets the curve was not fitted, and is off."""
    with_slots = experts.copy_s > 0.0
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    lanes = [("CPU", "cpu", experts.cpu), *([("slots", "gpu", experts.gpu)] if with_slots else [])]
    table.add_column("rows", justify="right")
    for name, _, _ in lanes:
        for unit in ("μs", "GB/s", "off"):
            table.add_column(f"{name} {unit}" if unit != "off" else unit, justify="right")
    fitted = {round(n) for n, _ in experts.cpu.points}
    for n in sorted(fitted | {held.n_rows for held in held_out}):
        cells = [str(n) if n in fitted else f"({n})"]
        for _, lane, curve in lanes:
            held = next((h for h in held_out if (h.lane, h.n_rows) == (lane, n)), None)
            seconds = curve(n) if held is None else held.measured_s
            off = "" if held is None else f"{100 * held.error:.1f} %"
            cells += [f"{seconds * 1e6:,.0f}", f"{experts.nbytes / seconds / 1e9:.1f}", off]
        table.add_row(*cells)
    return table


def _summary(found: "Calibration", took_s: float) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(found, took_s):
        table.add_row(name, value)
    return table


def _lines(found: "Calibration", took_s: float) -> Iterator[tuple[str, str]]:
    costs = found.costs
    first = costs.experts[0]
    if first.copy_s > 0.0:
        yield (
            "copies",
            f"{first.nbytes / first.copy_s / 1e9:.2f} GB/s alone, {first.copy_s * 1e6:,.0f} μs an expert",
        )
        cpu, link = costs.contention.cpu, costs.contention.link
        yield "side by side", f"the CPU takes {cpu:.2f} times as long, the link {link:.2f} times"
    yield from _beside_experts(costs)
    errors = sorted(held_out.error for held_out in found.held_out)
    if errors:
        yield (
            "off",
            f"{100 * errors[len(errors) // 2]:.1f} % in the median, at rows in brackets: no curve knows them",
        )
    yield "measured", f"now, in {took_s:.1f} s" if found.fresh else "before; --anew measures again"


def _beside_experts(costs: "CostModel") -> Iterator[tuple[str, str]]:
    """Yield the costs that are measured on a GPU only."""
    moves, dense = costs.moves, costs.dense
    if moves.fixed_s > 0.0:
        yield "moves", f"{moves.fixed_s * 1e6:,.0f} μs a layer, {moves.row_s * 1e9:,.0f} ns a row, there and back"
    if dense.rows(1) > 0.0:
        by_rows = ", ".join(f"{seconds * 1e6:,.0f} for {n:.0f}" for n, seconds in dense.rows.points)
        yield "dense part", f"μs a layer by rows: {by_rows}; {dense.context_s * 1e9:,.1f} ns a token of context"
        yield "output head", f"{dense.head(1) * 1e6:,.0f} μs for a row"
        yield "host", f"{costs.host_s * 1e6:,.0f} μs a layer beside that"
