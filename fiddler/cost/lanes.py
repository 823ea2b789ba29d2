"""Three lanes as queues of work in seconds: how long what is queued will take, bandwidth shared.

The simulated machine runs on this, and the scheduler keeps one beside the real lanes to know their backlogs.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from fiddler.cost.model import NO_CONTENTION, Contention

LaneName = Literal["cpu", "gpu", "link"]
LANES: tuple[LaneName, ...] = ("cpu", "gpu", "link")


@dataclass(slots=True)
class Queued:
    """A job in a lane, with the seconds it still takes while its lane has the machine to itself."""

    job: int
    work_s: float
    left_s: float
    urgent: bool = True
    """Demand, which goes before what is not; a started job is never overtaken."""
    started: bool = False
    ran_s: float = 0.0
    """Time in which `work_s - left_s` of it was done."""

    def run(self, seconds: float, factor: float) -> None:
        """Let it run for some time, `factor` times as long as alone."""
        self.left_s = max(0.0, self.left_s - seconds / factor)
        self.ran_s += seconds

    @property
    def slowdown(self) -> float:
        """How much longer than alone it took so far, for what it shared the machine with."""
        done_s = self.work_s - self.left_s
        return self.ran_s / done_s if done_s > 0.0 else 1.0


@dataclass(slots=True)
class Lanes:
    """The queues; the first of each runs. Where CPU and link are both busy each is slowed by its factor."""

    contention: Contention = NO_CONTENTION
    overlap: bool = True
    """False: the CPU works only while nothing is copied and the GPU rests, as one thread driving both in turn."""
    queues: dict[LaneName, deque[Queued]] = field(default_factory=lambda: {lane: deque() for lane in LANES})

    def put(self, lane: LaneName, job: int, seconds: float, *, urgent: bool = True) -> None:
        """Queue a job: an urgent one before those that are not and have not started."""
        queue = self.queues[lane]
        place = len(queue)
        while urgent and place > 0 and not (queue[place - 1].urgent or queue[place - 1].started):
            place -= 1
        queue.insert(place, Queued(job, seconds, seconds, urgent))
        queue[0].started = True

    def remove(self, lane: LaneName, job: int) -> Queued | None:
        """Take a job out, done or not, and return it; `None` if it is not there."""
        queue = self.queues[lane]
        found = next((queued for queued in queue if queued.job == job), None)
        if found is not None:
            queue.remove(found)
        if queue:
            queue[0].started = True
        return found

    def next_s(self) -> float | None:
        """Return the seconds until the next job is done, if none is added; `None` if none runs."""
        return min((self._left(lane) * factor for lane, factor in self.working().items()), default=None)

    def advance(self, seconds: float) -> list[tuple[LaneName, int]]:
        """Let time pass, no further than `next_s`; return the jobs done, taken out of their lanes."""
        done: list[tuple[LaneName, int]] = []
        for lane, factor in self.working().items():
            queue = self.queues[lane]
            head = queue[0]
            if head.left_s * factor <= seconds:
                done.append((lane, queue.popleft().job))
                if queue:
                    queue[0].started = True
            else:
                head.left_s -= seconds / factor
                head.ran_s += seconds
        return done

    def pass_by(self, seconds: float) -> None:
        """Let time pass beside real lanes: a job whose time is up stays, with nothing left, until it is removed.

        Only the first job of each lane runs, so there are two spans: CPU and link slow each other, then nobody
        does. Real lanes overlap, so `overlap` is taken as true.
        """
        cpu, gpu, link = (self.queues[lane] for lane in LANES)
        both_s = 0.0
        if cpu and link and cpu[0].left_s > 0.0 and link[0].left_s > 0.0:
            k = self.contention
            both_s = min(seconds, cpu[0].left_s * k.cpu, link[0].left_s * k.link)
            cpu[0].run(both_s, k.cpu)
            link[0].run(both_s, k.link)
        for queue, alone_s in ((cpu, seconds - both_s), (gpu, seconds), (link, seconds - both_s)):
            if queue and queue[0].left_s > 0.0 and alone_s > 0.0:
                queue[0].run(min(alone_s, queue[0].left_s), 1.0)

    def backlog_s(self, lane: LaneName) -> float:
        """Return the seconds of work queued in a lane, as it takes alone."""
        return sum(queued.left_s for queued in self.queues[lane])

    def ahead_s(self, job: int) -> float:
        """Return the link's seconds, as it takes alone, until a queued copy has landed; 0.0 if it is not queued."""
        ahead = 0.0
        for queued in self.queues["link"]:
            ahead += queued.left_s
            if queued.job == job:
                return ahead
        return 0.0

    def demand_s(self) -> float:
        """Return the link's seconds before a demand copy queued now could start, as it takes alone."""
        return sum(queued.left_s for queued in self.queues["link"] if queued.urgent or queued.started)

    def _left(self, lane: LaneName) -> float:
        queue = self.queues[lane]
        return queue[0].left_s if queue else 0.0

    def working(self) -> dict[LaneName, float]:
        """Return the lanes whose first job runs, each with how many times longer than alone it takes now."""
        cpu, link = self._left("cpu") > 0.0, self._left("link") > 0.0
        waits = not self.overlap and (link or self._left("gpu") > 0.0)
        both = cpu and link and not waits
        factors: dict[LaneName, float] = {
            "cpu": self.contention.cpu if both else 1.0,
            "gpu": 1.0,
            "link": self.contention.link if both else 1.0,
        }
        return {lane: factors[lane] for lane in LANES if self.queues[lane] and not (waits and lane == "cpu")}
