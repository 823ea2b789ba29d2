"""Three lanes as queues of work in seconds, with bandwidth shared between CPU and link.

The simulated machine runs on these queues. The scheduler keeps a second set beside the real lanes, to know their
backlogs.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fiddler.cost.model import NO_CONTENTION, Contention, LaneName


class Backlog(NamedTuple):
    """Seconds of work queued in each lane, as it takes alone."""

    cpu_s: float = 0.0
    gpu_s: float = 0.0
    link_s: float = 0.0


@dataclass(slots=True)
class Queued:
    """A job in a lane, with the seconds it still takes while its lane has the machine to itself."""

    job: int
    work_s: float
    left_s: float
    urgent: bool = True
    """Whether a layer waits for the job: it then goes before other jobs that have not started."""
    started: bool = False
    ran_s: float = 0.0
    """Time in which `work_s - left_s` seconds of its work were done."""


@dataclass(slots=True)
class Lanes:
    """The queues; the first of each runs. Where CPU and link are both busy each is slowed by its factor.

    All of this runs several times a layer: it goes through the three queues one by one, in plain lines.
    """

    contention: Contention = NO_CONTENTION
    overlap: bool = True
    """False: the CPU works only while link and GPU rest, as if one thread drove all in turn."""
    cpu: deque[Queued] = field(default_factory=deque)
    gpu: deque[Queued] = field(default_factory=deque)
    link: deque[Queued] = field(default_factory=deque)
    queues: dict[LaneName, deque[Queued]] = field(init=False)
    """The three by name."""

    def __post_init__(self) -> None:
        self.queues = {"cpu": self.cpu, "gpu": self.gpu, "link": self.link}

    def put(self, lane: LaneName, job: int, seconds: float, *, urgent: bool = True) -> None:
        """Queue a job: an urgent one before those that are not and have not started."""
        queue = self.queues[lane]
        queued = Queued(job, seconds, seconds, urgent, not queue)
        place = len(queue)
        if urgent and place > 1:  # the first has started
            while place > 1 and not queue[place - 1].urgent:
                place -= 1
            queue.insert(place, queued)
        else:
            queue.append(queued)

    def remove(self, lane: LaneName, job: int) -> float | None:
        """Take a job out, done or not; `None` if it is not there.

        Returns the seconds it was to take with what it shared the machine with, as far as it was seen to run.
        """
        queue = self.queues[lane]
        for found in queue:
            if found.job == job:
                queue.remove(found)
                if queue:
                    queue[0].started = True
                done_s = found.work_s - found.left_s
                return found.work_s * (found.ran_s / done_s) if done_s > 0.0 else found.work_s
        return None

    def next_s(self, working: Mapping[LaneName, float] | None = None) -> float | None:
        """Return the seconds until the next job is done, if none is added; `None` if none runs.

        `working` is what that says now, where it is known: so for `advance`.
        """
        least: float | None = None
        for lane, factor in (self.working() if working is None else working).items():
            seconds = self.queues[lane][0].left_s * factor
            if least is None or seconds < least:
                least = seconds
        return least

    def advance(
        self, seconds: float, working: Mapping[LaneName, float] | None = None
    ) -> list[tuple[LaneName, int]]:
        """Let time pass, no further than `next_s`; return the jobs done, taken out of their lanes."""
        done: list[tuple[LaneName, int]] = []
        for lane, factor in (self.working() if working is None else working).items():
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

        Only the first job of each lane runs, so there are two spans: CPU and link slow each other, then one of them
        runs alone. Real lanes overlap, so `overlap` is taken as true.
        """
        if seconds <= 0.0:
            return
        alone_s = seconds
        cpu = self.cpu[0] if self.cpu else None
        link = self.link[0] if self.link else None
        if cpu is not None and link is not None and cpu.left_s > 0.0 and link.left_s > 0.0:
            k = self.contention
            both_s = min(seconds, cpu.left_s * k.cpu, link.left_s * k.link)
            cpu.left_s = max(0.0, cpu.left_s - both_s / k.cpu)
            cpu.ran_s += both_s
            link.left_s = max(0.0, link.left_s - both_s / k.link)
            link.ran_s += both_s
            alone_s -= both_s
        for head in (cpu, link):
            if head is not None and head.left_s > 0.0 and alone_s > 0.0:
                ran_s = alone_s if alone_s < head.left_s else head.left_s
                head.left_s -= ran_s
                head.ran_s += ran_s
        if self.gpu:
            head = self.gpu[0]
            if head.left_s > 0.0:
                ran_s = seconds if seconds < head.left_s else head.left_s
                head.left_s -= ran_s
                head.ran_s += ran_s

    def backlog(self) -> Backlog:
        """Return the work queued in each lane, of the link's only what a demand copy queued now would wait for."""
        cpu_s = gpu_s = link_s = 0.0
        for queued in self.cpu:
            cpu_s += queued.left_s
        for queued in self.gpu:
            gpu_s += queued.left_s
        for queued in self.link:
            if queued.urgent or queued.started:
                link_s += queued.left_s
        return Backlog(cpu_s, gpu_s, link_s)

    def ahead_s(self, job: int) -> float:
        """Return the link's seconds, as it takes alone, until a queued copy has landed; 0.0 if it is not queued."""
        ahead = 0.0
        for queued in self.link:
            ahead += queued.left_s
            if queued.job == job:
                return ahead
        return 0.0

    def working(self) -> dict[LaneName, float]:
        """Return the lanes whose first job runs, each with how many times longer than alone it takes now."""
        cpu, gpu, link = self.cpu, self.gpu, self.link
        k_cpu = k_link = 1.0
        waits = False
        if cpu:
            copies = bool(link) and link[0].left_s > 0.0
            waits = not self.overlap and (copies or (bool(gpu) and gpu[0].left_s > 0.0))
            if copies and not waits and cpu[0].left_s > 0.0:
                k_cpu, k_link = self.contention.cpu, self.contention.link
        found: dict[LaneName, float] = {}
        if cpu and not waits:
            found["cpu"] = k_cpu
        if gpu:
            found["gpu"] = 1.0
        if link:
            found["link"] = k_link
        return found
