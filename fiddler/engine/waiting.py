"""Requests between submission and admission: their prompts are read, and they stand in line.

A few threads have the prompts read, so that none delays another's tokens. The line belongs to the engine's loop.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Lock, Thread
from time import monotonic

from fiddler.errors import EngineClosedError, EngineFailedError, FiddlerError, PromptError
from fiddler.steps.request import Request, Submission
from fiddler.text.prompts import Copied
from fiddler.text.reading import Asking, TooMany
from fiddler.text.tokenizer import Text, is_ids

N_THREADS = 4
"""Prompts read at once; the threads wait for the process that reads."""
PATIENCE_S = 0.5
"""Seconds that a prompt's reading may hold up later requests once it has begun."""
QUEUE_PATIENCE_S = 2.0
"""Seconds that it may hold them up before it begins: all threads are busy, or the process is not ready."""
_LEAVE_S = 5.0
"""Longest wait for the threads at the end: a tokenizer's own Python code may never return."""


@dataclass(slots=True, eq=False)
class Reading:
    """One prompt that is being read."""

    submission: Submission
    asking: Asking = field(default_factory=Asking)
    since_s: float = field(default_factory=monotonic)

    @property
    def slow(self) -> bool:
        """Whether later requests may overtake it."""
        now_s = monotonic()
        began_s = self.asking.began_s
        return now_s > self.since_s + QUEUE_PATIENCE_S or (began_s is not None and now_s > began_s + PATIENCE_S)


_FEW = 8192
"""Prompts of this many token ids are checked at once, in less time than a thread takes to start."""
Found = list[int] | TooMany | FiddlerError
"""A prompt's token ids, or its error."""


class Readings:
    """The reading threads; each result is passed to `tell`.

    Any thread may `put`. Threads are started as they are needed, and end with `close`.
    """

    def __init__(self, text: Text, n_most: int, tell: Callable[[Reading, Found], object]) -> None:
        self._text = text
        self._n_most = n_most
        self._tell = tell
        self._queue: SimpleQueue[Reading | None] = SimpleQueue()
        self._lock = Lock()
        self._threads: list[Thread] = []
        self._n_left = 0  # prompts put and not yet found
        self._closed = False

    def start(self) -> None:
        """Have a thread get the reading process ready, before the first prompt needs it."""
        with self._lock:
            self._hire(self._prepare)

    def put(self, reading: Reading) -> None:
        """Have a prompt read, a few token ids here and now. Nothing happens once closed."""
        if self._few(reading.submission.prompt):
            self._tell(reading, self._find(reading))
            return
        with self._lock:
            if self._closed:
                return
            self._n_left += 1
            if self._n_left > len(self._threads):
                self._hire(self._serve)
            if not self._threads:
                self._n_left -= 1
                self._tell(reading, EngineFailedError("no thread can be started to read prompts"))
                return
        self._queue.put(reading)

    def close(self) -> None:
        """End the threads and the reading process; prompts that were not read are dropped."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        self._text.close()
        until_s = monotonic() + _LEAVE_S
        for thread in self._threads:
            thread.join(max(0.0, until_s - monotonic()))

    def _few(self, prompt: Copied) -> bool:
        return is_ids(prompt) and (len(prompt) <= _FEW or len(prompt) > self._n_most)

    def _hire(self, work: Callable[[], None]) -> None:
        if len(self._threads) == N_THREADS:
            return
        thread = Thread(target=work, name="fiddler-reader", daemon=True)
        with suppress(RuntimeError):  # no more threads are to be had
            thread.start()
            self._threads.append(thread)

    def _prepare(self) -> None:
        with suppress(BaseException):  # the first prompt that needs it tries again, and is told
            self._text.start()
        self._serve()

    def _serve(self) -> None:
        while (reading := self._queue.get()) is not None and not self._closed:
            found = self._find(reading)
            with self._lock:
                self._n_left -= 1
            if not reading.asking.given_up:
                self._tell(reading, found)

    def _find(self, reading: Reading) -> Found:
        if reading.asking.given_up:
            return EngineClosedError("the request was given up")
        try:
            return self._text.read(reading.submission.prompt, self._n_most, reading.asking)
        except FiddlerError as error:
            return error
        except BaseException as error:  # of a tokenizer's own Python code
            refused = PromptError(f"the prompt could not be read: {type(error).__name__}: {error}")
            refused.__cause__ = error
            return refused


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
