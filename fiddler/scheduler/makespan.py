"""When a layer's lanes are done: in closed form what `fiddler.cost.lanes.Lanes` gives job by job."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(slots=True)
class Race:
    """CPU, GPU and link from now on. Work is in seconds, as it takes alone."""

    cpu_s: float
    """Queued before the layer's own, as the next two are."""
    gpu_s: float
    link_s: float
    copy_s: float
    k_cpu: float
    """How many times as long the CPU's work takes while the link is busy; at least 1, as the next."""
    k_link: float

    def ends(
        self,
        cpu_s: float | None,
        hits_s: float | None,
        landing: Collection[tuple[float, float]],
        fetch: Collection[float],
    ) -> tuple[float, float]:
        """Return the seconds until CPU and GPU have done the layer's loads, 0.0 where there are none.

        `cpu_s` is the CPU's work on its loads, `hits_s` the GPU's on hits; `None` without any. `landing` holds the
        link's work until each has landed and the GPU's on it, `fetch` the GPU's on each that is copied, in order.

        With `W` all the work of a lane, CPU and link slow each other for `t = min(W_cpu · k_cpu, W_link · k_link)`
        seconds, in which either does `t / k` of its work; so work `w` is done at `w + min(w, t / k) · (k - 1)`.
        """
        copy_s, link_s, free_s, extra = self.copy_s, self.link_s, self.gpu_s, self.k_link - 1.0
        all_cpu_s = self.cpu_s + (cpu_s or 0.0)
        both_s = min(all_cpu_s * self.k_cpu, (link_s + copy_s * len(fetch)) * self.k_link)
        slow_s = both_s / self.k_link
        if hits_s:
            free_s += hits_s
        for w, gpu_s in landing:
            landed_s = w + (w if w < slow_s else slow_s) * extra
            free_s = (free_s if free_s > landed_s else landed_s) + gpu_s
        for gpu_s in fetch:
            link_s += copy_s
            landed_s = link_s + (link_s if link_s < slow_s else slow_s) * extra
            free_s = (free_s if free_s > landed_s else landed_s) + gpu_s
        cpu_end_s = all_cpu_s + min(all_cpu_s, both_s / self.k_cpu) * (self.k_cpu - 1.0)
        return (
            0.0 if cpu_s is None else cpu_end_s,
            free_s if hits_s is not None or landing or fetch else 0.0,
        )
