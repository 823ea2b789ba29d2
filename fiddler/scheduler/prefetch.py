"""Copies experts ahead for a wave's next layer while the link is idle.

A copy ahead hides a read but saves none, and takes host memory's bandwidth from the CPU while it runs. So it is
made only if its chance of being used, times the seconds it saves, exceeds its cost.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policy import Key
from fiddler.cache.slots import Reservation
from fiddler.cost.lanes import Backlog
from fiddler.cost.model import CostModel
from fiddler.scheduler.guesses import Guess, NextLayer, Predictor, Rule, View, price_s, saved_s
from fiddler.scheduler.layer import Layer, Wave
from fiddler.scheduler.plan import Planner
from fiddler.types import PrefetchStatistics

WEIGHT = 0.02
"""Weight of the latest layer in running means."""
TRUST = 0.5
"""Chance that a guess comes true, before any was checked."""
ENOUGH = 64
"""Copies after which a predictor is judged."""
LOSS = 0.75
"""Prefetch is switched off if recent copies gained less than this share of their cost. Not 1.0: with a busy CPU
gain and cost are nearly equal, and short sums are noisy."""
REST = 1024
"""Layers for which prefetch stays off before it is tried again."""


@dataclass(slots=True)
class Usefulness:
    """Counts of copies made ahead. `gained_s` and `cost_s` are by the cost model."""

    n_issued: int = 0
    n_settled: int = 0
    """Copies whose layer has come."""
    n_landed: int = 0
    """Of these, landed before their layer began."""
    n_used: int = 0
    """Of the copies whose layer has come, those it visited, in time or late."""
    gained_s: float = 0.0
    cost_s: float = 0.0
    delay_s: float = 0.0
    """Seconds, as the link takes alone, that demand copies waited for them."""
    n_guesses: int = 0
    """Guesses whose layer has come, copied or not."""
    n_true: int = 0
    """Of these guesses, those that the layer visited."""


class Prefetcher:
    """Owner of the guesses for every wave's coming layer, and of the record of how well guesses did."""

    def __init__(self, predictor: Predictor, rule: Rule, cache: ExpertCache) -> None:
        self.predictor = predictor
        self.use = Usefulness()
        self.resting = 0
        """Layers for which prefetch stays switched off because it did not pay."""
        self._cache = cache
        self._rule = rule
        self._due: list[Key] = []  # leased for layers that have come
        self._chances: list[float] = []  # by place among the guesses
        self.gap_s = 0.0
        """Mean seconds from the end of a layer's experts to the next layer's experts."""
        self._expecting: dict[Wave, NextLayer] = {}  # in the order in which the waves came to it
        self._balance_s = 0.0  # gained less lost by the latest copies
        self._n_tried = 0

    def statistics(self) -> PrefetchStatistics:
        """Return the counts so far."""
        use = self.use
        precision = use.n_true / use.n_guesses if use.n_guesses else 0.0
        return PrefetchStatistics(use.n_issued, use.n_landed, use.n_used, use.delay_s, precision, self.resting > 0)

    def come(self, layer: Layer, rows: Mapping[int, int], now_s: float, costs: CostModel) -> None:
        """Take in a layer that a wave has reached, with its rows by expert, before it is planned."""
        wave = layer.wave
        passed_s, wave.passed_s = wave.passed_s, None
        if passed_s is not None:
            self.gap_s += (now_s - passed_s - self.gap_s) * (WEIGHT if self.gap_s else 1.0)
        coming = self._end(wave)
        if coming is not None and coming.layer == layer.index:
            self._settle(coming, rows, costs)
        if self.resting:
            self.resting -= 1
        expected = self.predictor.expects(layer)
        if expected:
            chances, guesses = self._chances, []
            while len(chances) < len(expected):
                chances.append(TRUST)
            for (expert, n_rows), chance in zip(expected, chances, strict=False):
                guesses.append(Guess(expert, n_rows, chance))
            wave.coming = self._expecting[wave] = NextLayer(layer.index + 1, tuple(guesses))

    def drop(self, wave: Wave) -> None:
        """Forget a wave."""
        self._end(wave)
        self.let_go()

    def _end(self, wave: Wave) -> NextLayer | None:
        """Take a wave's coming layer; its slots are released later."""
        coming, wave.coming = wave.coming, None
        if coming is not None:
            del self._expecting[wave]
            for expert in coming.leased:
                self._due.append((coming.layer, expert))
        return coming

    def let_go(self) -> None:
        """Release the slots that were kept for layers that have come; these have leased the ones they use."""
        for key in self._due:
            self._cache.release(key)
        self._due.clear()

    def landed(self, key: Key) -> None:
        """Lease the slot of a copy ahead until its layer comes, so that the next copy ahead does not evict it."""
        layer, expert = key
        for coming in self._expecting.values():
            if coming.layer == layer and expert in coming.copied and expert not in coming.leased:
                self._cache.lease(key)
                coming.leased.append(expert)

    def choose(self, costs: CostModel, backlog: Backlog, planner: Planner) -> Reservation | None:
        """Return the reservation of the expert to copy now that the link is idle; `None` for none."""
        if self.resting:
            return None
        for coming in self._expecting.values():
            layer, copied, absent = coming.layer, coming.copied, []
            kept, passing = self._cache.held(layer)
            for guess in coming.guesses:  # one that was copied and evicted since would be copied to and fro
                key = layer, guess.expert
                if guess.expert not in copied and key not in kept and key not in passing:
                    absent.append(guess)
            chosen = (
                self._rule.choose(View(coming, absent, costs, backlog, self.gap_s, planner)) if absent else None
            )
            if chosen is not None:
                reservation = self._issue(coming, chosen, price_s(costs, layer, backlog.cpu_s, self.gap_s))
                if reservation is not None:
                    return reservation
        return None

    def _issue(self, coming: NextLayer, guess: Guess, cost_s: float) -> Reservation | None:
        enter = self._cache.stage if self._rule.staged else self._cache.reserve
        reservation = enter((coming.layer, guess.expert))
        if reservation is not None:
            coming.copied[guess.expert] = cost_s
            self.use.n_issued += 1
        return reservation

    def _settle(self, coming: NextLayer, visited: Mapping[int, int], costs: CostModel) -> None:
        use, layer = self.use, coming.layer
        chances, n_true = self._chances, 0
        for place, guess in enumerate(coming.guesses):
            true = guess.expert in visited
            chances[place] += WEIGHT * (true - chances[place])
            n_true += true
        use.n_guesses += len(coming.guesses)
        use.n_true += n_true
        for expert, cost_s in coming.copied.items():
            key = layer, expert
            saves = expert in visited and self._cache.holds(key)  # it may have failed, or been evicted since
            gained_s = saved_s(costs, layer, visited[expert]) if saves else 0.0
            use.n_settled += 1
            use.n_landed += self._cache.slot(key) is not None
            use.n_used += expert in visited
            use.gained_s += gained_s
            use.cost_s += cost_s
            self._balance_s += gained_s - LOSS * cost_s
        if coming.copied:
            self._judge(len(coming.copied))

    def _judge(self, n_copies: int) -> None:
        """Switch prefetch off if it lost more than it gained."""
        self._n_tried += n_copies
        if self._n_tried >= ENOUGH:
            if self._balance_s < 0.0 and self._rule.judged:
                self.resting = REST
            self._balance_s, self._n_tried = 0.0, 0
