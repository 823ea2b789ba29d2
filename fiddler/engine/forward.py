"""One step of the model over some spans, as greenlet coroutines whose experts are computed by the lane."""

import inspect
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import Cache

from fiddler.engine.assemble import Span
from fiddler.engine.request import Request
from fiddler.models.kv import Directness, SequenceKV, WaveCache
from fiddler.models.loaded import ServableModel
from fiddler.models.seam import Compute, ExpertsCall, Forward


class StepRunner:
    """Runs steps of one model; knows how its rows travel."""

    def __init__(self, loaded: ServableModel, compute: Compute) -> None:
        self._model = loaded.model
        self._packed = loaded.packed
        self._compute = compute
        self._directness = Directness()
        self._keeps_rows = "logits_to_keep" in inspect.signature(loaded.model.forward).parameters

    def new_past(self) -> SequenceKV | None:
        """Return an empty past for one sequence; `None` where the model makes a cache of its own kind."""
        return SequenceKV() if self._packed else None

    def run(self, spans: Sequence[Span[Request]]) -> list[Tensor]:
        """Run the spans' rows and return the logits `[V]` of every `last` row, in the spans' order."""
        forwards = [self._wave(spans)] if self._packed else [self._single(span) for span in spans]
        try:
            return [row for logits in self._drive(forwards) for row in logits]
        finally:
            for forward in forwards:
                forward.close()

    def _wave(self, spans: Sequence[Span[Request]]) -> Forward:
        """All spans as one packed forward."""
        pasts = [cast("SequenceKV", span.request.past) for span in spans]
        cache = WaveCache(pasts, [span.n_rows for span in spans], self._directness)
        call = self._call(spans, cache)
        forward = Forward(lambda: call()[0])
        forward.wave = cache
        return forward

    def _single(self, span: Span[Request]) -> Forward:
        """One sequence on its own, with transformers' cache."""
        call = self._call([span], cast("Cache | None", span.request.past))

        def keep_past() -> Tensor:
            logits, span.request.past = call()
            return logits

        return Forward(keep_past)

    def _call(self, spans: Sequence[Span[Request]], cache: Cache | None) -> Callable[[], tuple[Tensor, Cache]]:
        """Return the model's forward over the spans: logits `[rows kept, V]` and the cache it used."""
        ids = [i for s in spans for i in s.request.tokens(s.start, s.stop)]
        positions = [p for s in spans for p in range(s.start, s.stop)]
        ends = torch.tensor([s.n_rows for s in spans]).cumsum(0) - 1
        keep = ends[torch.tensor([s.last for s in spans])]
        extra = {"logits_to_keep": keep} if self._keeps_rows else {}

        def call() -> tuple[Tensor, Cache]:
            output = self._model(
                input_ids=torch.tensor([ids]),
                position_ids=torch.tensor([positions]),
                past_key_values=cache,
                use_cache=True,
                **extra,
            )
            logits: Tensor = output.logits[0]
            return logits if self._keeps_rows else logits[keep], output.past_key_values

        return call

    def _drive(self, forwards: list[Forward]) -> list[Tensor]:
        """Run forwards side by side to their ends; those waiting at one layer share its experts."""
        results = [forward.send() for forward in forwards]
        while waiting := [i for i, forward in enumerate(forwards) if not forward.dead]:
            layer = min(results[i].layer for i in waiting)
            meeting = [i for i in waiting if results[i].layer == layer]
            outputs = self._experts([results[i] for i in meeting])
            for i, output in zip(meeting, outputs, strict=True):
                results[i] = forwards[i].send(output)
        return results

    def _experts(self, calls: list[ExpertsCall]) -> Sequence[Tensor]:
        if len(calls) == 1:
            return [self._compute(*calls[0])]
        layer = calls[0].layer
        joined = (torch.cat([getattr(c, name) for c in calls]) for name in ("hidden", "index", "weights"))
        outputs: Sequence[Tensor] = self._compute(layer, *joined).split([c.hidden.shape[0] for c in calls])
        return outputs
