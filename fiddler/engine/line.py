"""The waiting requests, in the order in which they came. The engine's loop is its only user."""

from collections.abc import Iterator
from dataclasses import dataclass

from fiddler.engine.readings import Reading
from fiddler.steps.request import Request, Submission


@dataclass(slots=True, eq=False)
class Waiting:
    """A waiting request; its prompt is being read until `request` is set."""

    submission: Submission
    reading: Reading
    request: Request | None = None


class Line:
    """The order of admission: first come, first served, but a prompt that takes long to read is overtaken."""

    def __init__(self) -> None:
        self._waiting: dict[Submission, Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(tuple(self._waiting.values()))

    def join(self, submission: Submission, reading: Reading) -> None:
        """Let a request wait, its prompt still to be read."""
        self._waiting[submission] = Waiting(submission, reading)

    def find(self, submission: Submission) -> Waiting | None:
        """Return the waiting request of a submission; `None` if its caller has left."""
        return self._waiting.get(submission)

    def leave(self, submission: Submission) -> None:
        """Remove a request from the line, to run or for good; its prompt is not read any further."""
        waiting = self._waiting.pop(submission, None)
        if waiting is not None:
            waiting.reading.asking.give_up()

    def first(self) -> Request | None:
        """Return the next request to admit; `None` if there is none, or an earlier prompt is still being read."""
        for waiting in self._waiting.values():
            if waiting.request is not None or not waiting.reading.slow:
                return waiting.request
        return None

    @property
    def held_up(self) -> bool:
        """Whether a request is ready but behind a prompt that is being read: time alone will admit it."""
        return self.first() is None and any(waiting.request is not None for waiting in self._waiting.values())
