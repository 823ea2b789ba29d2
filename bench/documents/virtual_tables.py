"""Tables of documents that show replays and simulations, each a function of results."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.documents.tables import OURS, TIMES, markdown
from bench.values import Record, one, percent, pick

DESKTOP = {"machine": "rtx4090-desktop", "resident": 0.25}
"""Of all the places of `bench.policies`, those that are shown."""
PEERS = (
    "freetoken",
    "hybrimoe",
    "hybrimoe-no-prefetch",
    "ktransformers",
    "fiddler-2024",
    "mixtral-offloading",
    "llama.cpp",
    "all-fetch",
    "all-cpu",
)
TRACES = {
    "demo, tuning": "demo, tuning",
    "demo, held out": "demo, held out",
    "made up, tuning": "looser",
    "made up, held out": "fitted, held out",
}
"""Of `bench.cache`: what a file calls them, and what documents do."""
GAIN = 1.0005
"""A speed that rounds to more than the same."""


def gain(cell: Record) -> float:
    """Return how many times faster the chosen waves are than one wave always."""
    return float(cell.auto_tokens_per_s / cell.one_tokens_per_s)


def gaining(report: Record) -> list[Record]:
    """Return the places where two waves gain."""
    return [cell for cell in report.cells if gain(cell) > GAIN]


def waves(report: Record) -> str:
    """Return the places where two waves gain as a table."""
    rows = [
        (
            cell.model,
            cell.machine,
            str(cell.n_sequences),
            f"{cell.one_tokens_per_s:.1f}",
            f"{cell.auto_tokens_per_s:.1f}",
            f"{gain(cell):.2f}{TIMES}",
        )
        for cell in gaining(report)
    ]
    return markdown(("model", "machine", "sequences", "one wave, tok/s", "chosen, tok/s", "gain"), rows)


def over_belady(report: Record, policy: str, traces: str) -> Record:
    """Return a policy's reads beside Belady's; `traces` as documents call them."""
    (named,) = (name for name, said in TRACES.items() if said == traces)
    return one(report.summary, policy=policy, traces=named)


def reads(report: Record) -> str:
    """Return reads beside Belady's by policy: mean / median."""
    rows = []
    for summary in sorted(pick(report.summary, traces="all"), key=lambda s: s.mean):
        found = [one(report.summary, policy=summary.policy, traces=name) for name in TRACES]
        rows.append((_policy(summary.policy), *(f"{s.mean:.2f} / {s.median:.2f}" for s in found)))
    return markdown(("reads beside Belady's", *TRACES.values()), rows)


def _policy(name: str) -> str:
    if name == "belady" or name.startswith("foresight"):
        return f"*{name}*"
    return f"**{name}**" if name == "forecast" else f"`{name}`"


def desktop(report: Record, model: str, n_sequences: int, routing: str = "fitted") -> Record:
    """Return the verdict on ours with a quarter of the experts on the desktop."""
    return one(report.verdicts, **DESKTOP, model=model, n_sequences=n_sequences, routing=routing)


def systems(report: Record) -> str:
    """Return tokens per second by place and system."""
    last = ("over `fiddler-2024`", "over the best", "of bound", "layer by layer")
    header = ("routing, model, sequences", "**ours**", *(f"`{name}`" for name in PEERS), *last)
    return markdown(header, [_place(report, verdict) for verdict in pick(report.verdicts, **DESKTOP)])


def _place(report: Record, verdict: Record) -> Sequence[str]:
    place = verdict.place
    cells = {cell.system: cell for cell in pick(report.cells, **place)}
    return (
        f"{place.routing}, {place.model}, {place.n_sequences}",
        *(f"{cells[name].tokens_per_s:#.3g}" for name in (OURS, *PEERS)),
        *(f"{verdict[name]:.2f}" for name in ("over_original", "over_best", "of_bound", "of_chain")),
    )


def predictions(report: Record) -> str:
    """Return published speeds beside predicted ones."""
    header = ("", "system", "published", "predicted", "error", "data sheet", "assumed", "implied")
    tables = dict.fromkeys(row.cell.table for row in report.cells)
    rows = [_published(row, not i) for table in tables for i, row in enumerate(pick(report.cells, table=table))]
    return markdown(header, rows)


def _published(row: Record, first: bool) -> Sequence[str]:
    return (
        row.cell.table if first else "",
        row.cell.system,
        *(f"{speed:.2f}" for speed in (row.cell.published, row.predicted)),
        percent(row.error, sign="+"),
        f"{row.of_data_sheet:.2f}",
        *("" if share is None else f"{share:.2f}" for share in (row.cpu_share, row.implied_cpu_share)),
    )


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    f.__name__: f for f in (gain, gaining, waves, over_belady, reads, desktop, systems, predictions)
}
