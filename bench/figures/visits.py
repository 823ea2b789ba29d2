"""Which experts the demo model visits, by layer and by the kind of text: what there is for a cache to learn."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bench.figures import style
from bench.figures.replay import TRACE
from fiddler.cache.recorded import RoutingTrace
from fiddler.store.routing import load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

N_COLUMNS = 3
HIGHEST = 0.25
"""Where the colours end: few experts get more."""
BUSIEST = 0.25
"""Share of the experts that the panels' titles count."""


def draw() -> "Figure":
    """Return a panel for each domain of the trace."""
    trace = load(TRACE)
    shares = by_domain(trace)
    n_layers, n_experts = len(trace.n_experts), trace.n_experts[0]
    part = f"{100 * BUSIEST:g} %"
    lines = (
        f"Demo model, {n_layers} layers of {n_experts} experts, routing recorded on held-out text.",
        f"In brackets: what the busiest {part} of a layer's experts get of its visits; {part} if all were alike.",
    )
    figure = style.figure(4.3, "Each kind of text has its own busy experts", lines)
    panels = figure.subplots(-(-len(shares) // N_COLUMNS), N_COLUMNS, sharex=True, sharey=True).flat
    for axes, (domain, share) in zip(panels, shares.items(), strict=True):
        mesh = _panel(axes, share)
        axes.set_title(f"{domain} ({100 * busiest(share):.0f} %)")
    style.labels(figure, "expert", "layer")
    bar = figure.colorbar(mesh, ax=figure.axes, format=lambda x, _: f"{100 * x:.0f} %", pad=0.02, extend="max")
    bar.set_label(f"share of a layer's visits; even: {100 / n_experts:g} %", fontsize=style.SMALL)
    bar.outline.set_visible(False)
    return figure


def _panel(axes: "Axes", share: NDArray[np.float64]) -> "QuadMesh":
    n_layers, n_experts = share.shape
    edges = np.arange(n_experts + 1) - 0.5, np.arange(n_layers + 1) - 0.5
    axes.set_xticks(range(0, n_experts, 5))
    axes.set_yticks(range(n_layers))
    axes.set_ylim(n_layers - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return axes.pcolormesh(*edges, share, vmin=0.0, vmax=HIGHEST, cmap="YlGnBu", edgecolor="white", lw=0.5)


def by_domain(trace: RoutingTrace) -> Mapping[str, NDArray[np.float64]]:
    """Return the share of each layer's visits that each expert gets, `[L, E]`, by domain."""
    counts: dict[str, NDArray[np.float64]] = {}
    for recording in trace.recordings:
        domain = recording.name.partition("/")[0]
        layers = [
            np.bincount(rows[rows >= 0], minlength=trace.n_experts[0]) for rows in recording.experts.swapaxes(0, 1)
        ]
        counts[domain] = counts.get(domain, 0.0) + np.stack(layers)
    return {domain: count / count.sum(axis=1, keepdims=True) for domain, count in counts.items()}


def busiest(shares: NDArray[np.float64]) -> float:
    """Return what the busiest `BUSIEST` of each layer's experts get, in the mean over layers."""
    n = round(BUSIEST * shares.shape[1])
    return float(np.sort(shares, axis=1)[:, -n:].sum(axis=1).mean())
