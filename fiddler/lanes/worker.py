"""A thread that does the jobs of one lane."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from queue import PriorityQueue
from threading import Thread

from fiddler.errors import EngineFailedError
from fiddler.lanes.latch import Latch
from fiddler.scheduler.messages import CopyExpert, Job


@dataclass(order=True, slots=True)
class _Queued:
    rank: int
    number: int
    job: Job | None = field(compare=False)


_URGENT, _IDLE, _END = range(3)


class Worker:
    """Does jobs in order; what is urgent goes before what is not and has not started.

    `working` is entered in the thread, for its life. `died` is told, there, of whatever ends it early. Raises
    `EngineFailedError` where the machine has no thread left.
    """

    def __init__(
        self,
        name: str,
        do: Callable[[Job], None],
        died: Callable[[BaseException], None],
        working: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._do = do
        self._died = died
        self._working = working
        self._numbers = count()
        self._queue: PriorityQueue[_Queued] = PriorityQueue()
        self._ended = Latch()
        self._thread = Thread(target=self._work, name=f"fiddler-{name}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise EngineFailedError(f"a thread could not be started: {error}") from error

    def put(self, job: Job) -> None:
        """Queue a job."""
        rank = _IDLE if isinstance(job, CopyExpert) and not job.urgent else _URGENT
        self._queue.put(_Queued(rank, next(self._numbers), job))

    def end(self) -> None:
        """Let it end once it is through with what is queued."""
        self._queue.put(_Queued(_END, next(self._numbers), None))

    async def join(self) -> None:
        """Wait for its end."""
        await self._ended.wait()
        self._thread.join()  # its last steps take no time

    def _work(self) -> None:
        try:
            with self._working():
                while (job := self._queue.get().job) is not None:
                    self._do(job)
        except BaseException as error:
            self._died(error)
        finally:
            self._ended.set()
