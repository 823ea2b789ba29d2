"""`fiddler inspect`: shows a checkpoint's sizes and whether it fits this machine, without reading its weights."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fiddler.cli.notes import Notes, size
from fiddler.cli.options import CheckpointOptions
from fiddler.cli.terminal import guarded

if TYPE_CHECKING:
    from fiddler.cli.facts import Amount, Facts


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """How the result is printed."""

    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False


def inspect(checkpoint: CheckpointOptions, output: InspectOptions) -> None:
    """Show what a checkpoint holds, what a token reads of it, and how it fits this machine.

    Reads the headers of its files, and downloads nothing.
    """
    with guarded():
        with Notes(quiet=output.as_json).working("reading headers"):
            checkpoint.find(download=False)
            from fiddler.cli.facts import read_facts

            facts = read_facts(checkpoint.source, trust_remote_code=checkpoint.trust_remote_code)
        if output.as_json:
            print(json.dumps(facts.as_json()))
        else:
            Console(highlight=False).print(_table(facts))


def _table(facts: "Facts") -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(name, value)
    return table


def _rows(facts: "Facts") -> list[tuple[str, str]]:
    sizes = facts.sizes
    rows = [
        ("checkpoint", facts.folder),
        ("architecture", f"{facts.architecture} ({facts.model_type}), {facts.dtype}"),
        ("context", f"{facts.context:,} tokens"),
        ("layers", f"{facts.layers}, {facts.moe_layers} of them with experts"),
        ("experts", f"{sizes.experts_per_layer} a layer, a token visits {sizes.top_k} of them"),
        ("dense part", _amount(sizes.dense)),
        ("all experts", f"{_amount(sizes.experts)}, {size(sizes.bytes_per_expert)} each, {facts.experts_dtype}"),
        ("total", _amount(sizes.total)),
        ("read per token", _per_token(facts)),
        ("sequences", "share one forward" if facts.packed else "run one forward each, and meet at the experts"),
        ("memory", _memory(facts)),
    ]
    unused = facts.stored_parameters - sizes.total.parameters
    if unused > 0:
        rows.insert(8, ("not used", f"{_count(unused)} parameters of what is stored"))
    return rows


def _amount(amount: "Amount") -> str:
    return f"{size(amount.bytes)} ({_count(amount.parameters)} parameters)"


def _count(n: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if n >= unit:
            return f"{n / unit:.2f} {name}"
    return f"{n:,}"


def _per_token(facts: "Facts") -> str:
    sizes = facts.sizes
    return f"{size(sizes.expert_bytes_per_token)} of experts, {size(sizes.dense_bytes_per_token)} of the dense part"


def _memory(facts: "Facts") -> str:
    machine, sizes = facts.machine, facts.sizes
    available = f"{size(machine.ram_available_bytes)} available"
    if machine.fits == "ram":
        return f"fits in RAM ({available})"
    if machine.fits == "no":
        return f"does not fit: the dense part needs {size(sizes.dense.bytes)} of RAM, {available}"
    cached, all_experts = size(machine.cacheable_expert_bytes), size(sizes.experts.bytes)
    return f"experts are mapped from disk: {cached} of {all_experts} can stay in the page cache ({available})"
