"""The requests that do not run yet, in the order they came in. The engine's loop is its only user."""

from collections.abc import Iterator
from dataclasses import dataclass

from fiddler.engine.readings import Reading
from fiddler.engine.request import Request, Submission


@dataclass(slots=True, eq=False)
class Waiting:
    """A request that does not run yet; its prompt is being read until there is a `request`."""

    submission: Submission
    reading: Reading
    request: Request | None = None


class Line:
    """Who waits, and who is next: the first that came, but nobody waits for long for one that is being read."""

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
        """Return who waits with this submission; `None` if its caller has left."""
        return self._waiting.get(submission)

    def leave(self, submission: Submission) -> None:
        """Let somebody go, to run or for good; a prompt that is being read is given up."""
        waiting = self._waiting.pop(submission, None)
        if waiting is not None:
            waiting.reading.asking.give_up()

    def first(self) -> Request | None:
        """Return the request that is let in next; `None` where there is none, or one before it is being read."""
        for waiting in self._waiting.values():
            if waiting.request is not None or not waiting.reading.slow:
                return waiting.request
        return None

    @property
    def held_up(self) -> bool:
        """Whether somebody has been read and is behind one that has not: time lets it in, without any news."""
        return self.first() is None and any(waiting.request is not None for waiting in self._waiting.values())
