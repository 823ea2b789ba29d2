"""What a plan is told of a layer's loads: where their weights are, and what the cache holds them to be worth."""

from collections.abc import Sequence

from fiddler.cache.cache import ExpertCache
from fiddler.scheduler.copies import Copies
from fiddler.scheduler.layer import LayerRun
from fiddler.scheduler.plan import Candidate
from fiddler.scheduler.routing import Load


def candidates(run: LayerRun, loads: Sequence[Load], cache: ExpertCache, copies: Copies | None) -> list[Candidate]:
    """Return a candidate for each load of a layer; without `copies` none is on its way."""

    def candidate(load: Load) -> Candidate:
        key = (run.layer, load.expert)
        if load.expert in run.leased:
            return Candidate(load, "hit")
        ahead_s = copies.ahead_s(key) if copies is not None else None
        if ahead_s is not None:
            return Candidate(load, "landing", ahead_s=ahead_s)
        score = run.scores[load.expert] if run.scores else cache.score(key)
        return Candidate(load, "miss", score=score)

    return [candidate(load) for load in loads]
