"""What is to be told once a GPU has passed a point: asked for, never waited for."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

from fiddler.devices.gpu import Event
from fiddler.scheduler.messages import Report

Tell = Callable[[], Report | None]
"""Makes the report of a point that was passed, or none where all is said."""


@dataclass(slots=True)
class _Points:
    """Points of one stream, in its order: if one is not passed, none behind it is."""

    waiting: deque[tuple[Event, Tell]] = field(default_factory=deque)

    def passed(self) -> list[Tell]:
        found = []
        while self.waiting and self.waiting[0][0].done():
            found.append(self.waiting.popleft()[1])
        return found


class Watch:
    """Points of a GPU's streams that somebody wants to hear of."""

    def __init__(self) -> None:
        self._main, self._link, self._down = _Points(), _Points(), _Points()

    def main(self, event: Event, tell: Tell) -> None:
        """Tell once the main stream has passed `event`."""
        self._main.waiting.append((event, tell))

    def link(self, event: Event, tell: Tell) -> None:
        """Tell once the copies up to `event` have landed."""
        self._link.waiting.append((event, tell))

    def down(self, event: Event, tell: Tell) -> None:
        """Tell once what is on its way to the host up to `event` is there."""
        self._down.waiting.append((event, tell))

    def collect(self) -> list[Report]:
        """Return what is to be told now: of the main stream first, for what comes down from it comes later."""
        down = self._down.passed()  # asked first, or it could pass a point that the main stream was not seen to
        told = (tell() for tell in chain(self._main.passed(), self._link.passed(), down))
        return [report for report in told if report is not None]
