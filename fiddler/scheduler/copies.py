"""Copies under way, and the loads that wait for them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from fiddler.cache.cache import ExpertCache
from fiddler.cache.keys import Key
from fiddler.cache.slots import Reservation
from fiddler.scheduler.jobs import Jobs
from fiddler.scheduler.layer import LayerRun
from fiddler.scheduler.messages import CopyExpert, Reason
from fiddler.scheduler.routing import Load

Waiting = tuple[LayerRun, Load]


@dataclass(slots=True)
class _Copy:
    job: int
    reservation: Reservation
    waiting: list[Waiting] = field(default_factory=list)
    ordered: bool = False
    """Whether the GPU may be given what needs it."""
    used: bool = False
    """Whether it was, before it landed."""


class Copies:
    """Owner of every copy under way: the slot it goes into, and what will run once it has landed."""

    def __init__(self, cache: ExpertCache, jobs: Jobs) -> None:
        self._cache = cache
        self._jobs = jobs
        self._copies: dict[Key, _Copy] = {}
        self._by_job: dict[int, _Copy] = {}

    @property
    def waiting(self) -> list[Waiting]:
        """Every load that waits for a copy."""
        return [pair for copy in self._copies.values() for pair in copy.waiting]

    def start(self, reservation: Reservation, reason: Reason, *waiting: Waiting) -> CopyExpert:
        """Queue the copy that a slot was reserved for, and let loads wait for it."""
        job = self._jobs.copy(reservation, reason)
        copy = _Copy(job.job, reservation, list(waiting))
        self._copies[reservation.key] = self._by_job[job.job] = copy
        return job

    def ahead_s(self, key: Key) -> float | None:
        """Return the link's seconds, as it takes alone, until an expert has landed; `None` if it is not copied."""
        copy = self._copies.get(key)
        return None if copy is None else self._jobs.ahead_s(copy.job)

    def slot(self, key: Key) -> int:
        """Return the slot an expert is in, or on its way into."""
        slot = self._cache.slot(key)
        return self._copies[key].reservation.slot if slot is None else slot

    def wait(self, run: LayerRun, load: Load) -> bool:
        """Let a load wait for a copy that is under way; whether it has to."""
        copy = self._copies[run.layer, load.expert]
        if not copy.ordered:
            copy.waiting.append((run, load))
        copy.used |= copy.ordered
        return not copy.ordered

    def order(self, job: int) -> list[Waiting]:
        """Let nothing wait for a copy any more; returns what did."""
        copy = self._by_job.get(job)
        if copy is None:
            return []
        waiting, copy.waiting = copy.waiting, []
        copy.ordered, copy.used = True, bool(waiting)
        return waiting

    def end(self, key: Key, landed: Callable[[Key], None], *, failed: bool) -> list[Waiting]:
        """Make a copy's slot READY and say so, or free if it failed; returns what waited for it."""
        copy = self._copies.pop(key)
        del self._by_job[copy.job]
        (self._cache.failed if failed else self._cache.landed)(copy.reservation)
        if not failed:
            landed(key)
            if copy.used:  # by who had no lease, and a slot in passing is judged as one ends
                self._cache.lease(key)
                self._cache.release(key)
        return copy.waiting

    def drop(self, wave: int) -> None:
        """Let go of a wave's loads; a copy that was started lands all the same."""
        for copy in self._copies.values():
            copy.waiting = [(run, load) for run, load in copy.waiting if run.wave != wave]

    def check(self) -> None:
        """Raise `AssertionError` unless every copy has one job and its slot."""
        jobs = {job.job: (job.layer, job.expert) for job in self._jobs.all if isinstance(job, CopyExpert)}
        assert jobs == {copy.job: key for key, copy in self._copies.items()}, "copies and their jobs differ"
        assert self._by_job == {copy.job: copy for copy in self._copies.values()}, "a copy is lost, by its job"
        for key, copy in self._copies.items():
            assert self._cache.loading(key) == copy.reservation, "a copy is under way into no slot"
