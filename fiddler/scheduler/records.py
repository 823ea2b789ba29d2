"""How long layers took beside what was predicted: for the statistics and the trace."""

from dataclasses import replace

from fiddler.scheduler.counters import Counters
from fiddler.scheduler.layer import LayerRun
from fiddler.scheduler.messages import LayerTook
from fiddler.trace import Decision, Trace


class LayerRecords:
    """Owner of the decisions whose layers are passed and not over yet, for lanes may only keep an order."""

    def __init__(self, counters: Counters, trace: Trace | None) -> None:
        self._counters = counters
        self._trace = trace
        self._open: dict[tuple[int, int], Decision] = {}

    def passed(self, run: LayerRun, now_s: float) -> None:
        """Take note of a layer whose forward goes on: measured now, or once `took` says so."""
        assert run.plan is not None
        decision = run.decision(run.plan, now_s)
        if run.unended:
            self._open[run.wave, run.layer] = decision
        else:
            self._keep(decision)

    def took(self, event: LayerTook) -> None:
        """Take note of what a layer took; nothing happens if that is known."""
        decision = self._open.pop((event.wave, event.layer), None)
        if decision is not None:
            self._keep(replace(decision, measured_s=event.took_s))

    def drop(self, wave: int) -> None:
        """Wait for nothing more of a wave."""
        self._open = {key: decision for key, decision in self._open.items() if key[0] != wave}

    def _keep(self, decision: Decision) -> None:
        self._counters.measured(decision.predicted_s, decision.measured_s)
        if self._trace is not None:
            self._trace.decision(decision)
