"""How other systems divide a layer's loads, as published; none of them looks at a lane's backlog.

Sources: Kamahori et al., "Fiddler", ICLR 2025 (`cheapest_each`); Zhong et al., "HybriMoE", 2025 (`two_ended`);
FreeToken, 2026 (`bandwidth_split`); KTransformers, SOSP 2025 (`cpu_or_stream`).
"""

from collections import deque
from collections.abc import Sequence

from fiddler.cost.model import CostModel
from fiddler.scheduler.plan import Backlog, Candidate, Plan, all_cpu, all_fetch, assign

PROMPT_ROWS = 8
"""Mean rows of a layer's loads from which on FreeToken is held to be in a prompt, which it streams."""
STREAM_ROWS = 64
"""The same of KTransformers, whose prompts must be long for that."""


def cheapest_each(
    layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int
) -> Plan:
    """Run each load where it alone takes less, its copy included: the least sum, whatever runs side by side."""
    expert = costs.experts[layer]
    cpu: list[Candidate] = []
    gpu: list[Candidate] = []
    for c in _by_rows(candidates):
        fetch = c.place == "miss"
        gpu_s = expert.gpu(c.load.n_rows) + expert.copy_s * fetch
        if expert.cpu(c.load.n_rows) <= gpu_s or (fetch and not n_fetch):
            cpu.append(c)
        else:
            gpu.append(c)
            n_fetch -= fetch
    return assign(layer, cpu, gpu, costs, backlog)


def two_ended(
    layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int
) -> Plan:
    """Let the GPU take loads from the head and the CPU from the tail, whoever would be done first.

    The list holds what is in slots or on its way, then the rest, most rows first in both. A fetch starts when the
    link is free.
    """
    expert = costs.experts[layer]
    order = deque([c for c in _by_rows(candidates) if c.place != "miss"])
    order += [c for c in _by_rows(candidates) if c.place == "miss"]
    cpu: list[Candidate] = []
    gpu: list[Candidate] = []
    cpu_s = gpu_s = 0.0
    link_s = max((c.ahead_s for c in candidates), default=0.0)
    while order:
        head, tail = order[0], order[-1]
        head_s, tail_s = expert.gpu(head.load.n_rows), expert.cpu(tail.load.n_rows)
        fetch = head.place == "miss"
        if fetch:
            head_s += max(0.0, link_s + expert.copy_s - gpu_s)
        else:
            head_s += max(0.0, head.ahead_s - gpu_s)
        if gpu_s + head_s <= cpu_s + tail_s and not (fetch and not n_fetch):
            gpu.append(order.popleft())
            gpu_s += head_s
            link_s += expert.copy_s * fetch
            n_fetch -= fetch
        else:
            cpu.append(order.pop())
            cpu_s += tail_s
    return assign(layer, cpu, gpu, costs, backlog)


def bandwidth_split(
    layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int
) -> Plan:
    """Fetch the link's share of both rates, each as it is beside the other, of the misses; of a prompt's all.

    The original does so only where the CPU reads at more than twice the link's rate, and fetches every miss
    elsewhere. That is slower on every machine described here, so the threshold is left out.
    """
    expert, k = costs.experts[layer], costs.contention
    link, cpu = 1.0 / (expert.copy_s * k.link), 1.0 / (expert.cpu(1) * k.cpu)
    if _mean_rows(candidates) >= PROMPT_ROWS:
        return all_fetch(layer, candidates, costs, backlog, n_fetch)
    n_misses = sum(c.place == "miss" for c in candidates)
    return all_fetch(layer, candidates, costs, backlog, min(n_fetch, round(n_misses * link / (link + cpu))))


def cpu_or_stream(
    layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int
) -> Plan:
    """Run every miss on the CPU; in a long prompt copy all of them in."""
    plan = all_fetch if _mean_rows(candidates) >= STREAM_ROWS else all_cpu
    return plan(layer, candidates, costs, backlog, n_fetch)


def _by_rows(candidates: Sequence[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda c: (-c.load.n_rows, -c.score, c.load.expert))


def _mean_rows(candidates: Sequence[Candidate]) -> float:
    return sum(c.load.n_rows for c in candidates) / len(candidates) if candidates else 0.0
