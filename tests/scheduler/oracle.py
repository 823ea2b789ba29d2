"""The best plan there is, by trying them all; what a plan takes is found by running it on `Lanes`."""

from collections.abc import Iterator, Sequence
from itertools import product

from fiddler.cost.lanes import Lanes
from fiddler.cost.model import LaneName
from fiddler.scheduler.plan import Candidate, Plan
from tests.scheduler.instances import Instance

Split = tuple[list[Candidate], list[Candidate]]
"""For the CPU, and for the GPU."""

CPU_JOB, HITS_JOB, BEFORE = -1, -2, -3
"""Jobs beside the copies and GPU jobs of single experts, which go by the expert's id."""


def execute(given: Instance, cpu: Sequence[Candidate], gpu: Sequence[Candidate]) -> float:
    """Return the seconds until the layer is done; misses in `gpu` are copied in the order given."""
    lanes, costs = Lanes(given.costs.contention), given.costs
    late = {c.load.expert: costs.gpu_s(0, [c.load.n_rows]) for c in gpu if c.place != "hit"}
    hits = [c.load.n_rows for c in gpu if c.place == "hit"]
    left = set(late)
    _put(lanes, "cpu", BEFORE, given.backlog.cpu_s)
    _put(lanes, "gpu", BEFORE, given.backlog.gpu_s)
    if cpu:
        lanes.put("cpu", CPU_JOB, costs.cpu_s(0, [c.load.n_rows for c in cpu]))
        left.add(CPU_JOB)
    if hits:
        lanes.put("gpu", HITS_JOB, costs.gpu_s(0, hits))
        left.add(HITS_JOB)
    _put_copies(lanes, given, [c.load.expert for c in gpu if c.place == "miss"])
    now = 0.0
    while left:
        step = lanes.next_s()
        assert step is not None
        now += step
        for lane, job in lanes.advance(step):
            if lane == "link" and job in late:
                lanes.put("gpu", job, late[job])
            elif lane != "link":
                left.discard(job)
    return now


def _put(lanes: Lanes, lane: LaneName, job: int, seconds: float) -> None:
    if seconds > 0.0:
        lanes.put(lane, job, seconds)


def _put_copies(lanes: Lanes, given: Instance, fetch: Sequence[int]) -> None:
    """The link's backlog, in pieces that end where experts land, and the fetches behind it."""
    queued_s = 0.0
    for c in sorted((c for c in given.candidates if c.place == "landing"), key=lambda c: c.ahead_s):
        lanes.put("link", c.load.expert, c.ahead_s - queued_s)
        queued_s = c.ahead_s
    _put(lanes, "link", BEFORE, given.backlog.link_s - queued_s)
    for expert in fetch:
        lanes.put("link", expert, given.costs.experts[0].copy_s)


def splits(given: Instance) -> Iterator[Split]:
    """Every way to divide the loads, of equal ones only how many; fetches with the longest on the GPU first."""
    gpu = given.costs.experts[0].gpu
    kinds: dict[tuple[object, ...], list[Candidate]] = {}
    for c in sorted(given.candidates, key=lambda c: -gpu(c.load.n_rows)):
        kinds.setdefault((c.place, c.load.n_rows, c.ahead_s), []).append(c)
    for counts in product(*(range(len(same) + 1) for same in kinds.values())):
        on = [c for n, same in zip(counts, kinds.values(), strict=True) for c in same[:n]]
        if sum(c.place == "miss" for c in on) <= given.n_fetch:
            yield [c for n, same in zip(counts, kinds.values(), strict=True) for c in same[n:]], on


def alone_s(given: Instance, split: Split) -> float:
    """Return the longest lane's seconds if no lane waited for another or slowed it: no plan takes less."""
    (cpu, gpu), costs, backlog = split, given.costs, given.backlog
    n_copies = sum(c.place == "miss" for c in gpu)
    return max(
        costs.cpu_s(0, [c.load.n_rows for c in cpu]) + backlog.cpu_s if cpu else 0.0,
        costs.gpu_s(0, [c.load.n_rows for c in gpu]) + backlog.gpu_s if gpu else 0.0,
        n_copies * costs.experts[0].copy_s + backlog.link_s if n_copies else 0.0,
    )


def best_s(given: Instance) -> float:
    """Return the seconds of the best plan. Splits that the bound rules out are not run."""
    bounds = sorted(
        ((alone_s(given, split), i, split) for i, split in enumerate(splits(given))), key=lambda b: b[:2]
    )
    best = float("inf")
    for bound, _, split in bounds:
        if bound >= best:
            break
        best = min(best, execute(given, *split))
    return best


def replay(given: Instance, plan: Plan) -> float:
    """Return the seconds that a plan takes on `Lanes`."""
    return execute(given, given.named(plan.cpu), given.named(plan.gpu + plan.fetch))
