"""Seconds of a GPU's streams, taken between two events and never by waiting for the GPU."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch

from bench.report import Spread
from fiddler.gpu.device import Event, Gpu, Stream

Work = Callable[[], object]


def until(event: Event) -> Event:
    """Ask for an event until the GPU has passed it."""
    while not event.done():
        pass
    return event


def took(gpu: Gpu, stream: Stream, work: Work, n: int = 1, before: Work | None = None) -> float:
    """Return the GPU's seconds of one of `n` runs of `work`, queued one behind the other.

    The stream rests when they are queued, so that launches count where they take longer than what they launch; or
    it runs `before` first, behind which the host gets ahead and launches are hidden.
    """
    queue = gpu.launch if stream is gpu.main else stream.run
    until(stream.mark())
    if before is not None:
        queue(before)
    began = stream.mark()
    for _ in range(n):
        queue(work)
    return until(stream.mark()).since(until(began)) / n


def busy(gpu: Gpu, size: int) -> Work:
    """Return what keeps the main stream busy for a while: a few matrix products of `size` rows and columns."""
    x = torch.ones(size, size, device=gpu.device, dtype=torch.bfloat16)
    out = torch.empty_like(x)

    def work() -> None:
        for _ in range(4):
            torch.mm(x, x, out=out)

    return work


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Return median, least and most, ready for JSON."""
    return asdict(Spread.of(values))
