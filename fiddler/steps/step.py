"""One step of the model over some spans: the forwards it takes, and each span's outcome."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Cache

from fiddler.lanes.runner import Runner, run_step
from fiddler.models.attention import Row
from fiddler.models.kv import Directness, Run, SequenceKV, WaveCache
from fiddler.models.loaded import ServableModel
from fiddler.models.rotary import starts_over
from fiddler.models.seam import Forward
from fiddler.scheduler.waves import RowSpan, Waves
from fiddler.steps.recorder import Recorder, WaveRecord
from fiddler.steps.request import Request
from fiddler.steps.wave import Experts, ModelWave

if TYPE_CHECKING:
    from fiddler.steps.graphs import Graphs, Replay


@dataclass(slots=True)
class Outcome:
    """A step's result for one span: logits `[V]` of its last row where a token is picked, or an error."""

    logits: Tensor | None = None
    error: BaseException | None = None


class StepRunner:
    """Runs steps of one model; knows how the model's rows travel."""

    def __init__(
        self,
        loaded: ServableModel,
        runner: Runner,
        experts: Experts,
        waves: Waves,
        recorder: Recorder | None = None,
        graphs: "Graphs | None" = None,
    ) -> None:
        self._model = loaded.model
        self._device = next(loaded.model.parameters()).device
        self._packed = loaded.packed
        self._rotary = loaded.rotary
        self._runner = runner
        self._experts = experts
        self._waves = waves
        self._recorder = recorder
        self.graphs = graphs
        """Records decoding steps, on a GPU."""
        self.arena = graphs.arena if graphs is not None else None
        """Memory for the keys and values of all sequences; `None` where each has buffers of its own."""
        self._directness = Directness()
        self._keeps_rows = "logits_to_keep" in inspect.signature(loaded.model.forward).parameters

    def new_past(self, run: Run | None = None) -> SequenceKV | None:
        """Return an empty past for one sequence; `None` where the model makes a cache of its own kind.

        It lies in `run` of the arena, which the caller has reserved, or in buffers of its own that grow.
        """
        return SequenceKV(run) if self._packed else None

    def starts_over(self, request: Request) -> bool:
        """Whether a sequence's next token is rotated in another way than its past, and the past has to be too."""
        n_past = request.n_past
        if self._rotary is None or request.prefilling:
            return False
        return self._rotary.regime(n_past) != self._rotary.regime(n_past + 1) and starts_over(self._model, n_past)

    def run(self, spans: Sequence[RowSpan[Request]]) -> list[Outcome]:
        """Run the spans' rows; one outcome a span. A part of a cut span that fails fails the span."""
        ordered = sorted(spans, key=self._regime) if self._packed and self._rotary is not None else spans
        waves = run_step(self._runner, self._waves, ordered, self._wave, cut=self._packed)
        outcomes: dict[int, Outcome] = {}
        for part, wave in waves:
            for span, outcome in zip(part, self._outcomes(part, wave), strict=True):
                earlier = outcomes.get(id(span.request))
                if earlier is None or earlier.error is None:
                    outcomes[id(span.request)] = outcome
        for part, wave in waves:
            if wave.record is not None:
                self._keep(wave.record, [(s, outcomes[id(s.request)].error is None) for s in part])
        return [outcomes[id(span.request)] for span in spans]

    def run_again(self, spans: Sequence[RowSpan[Request]]) -> list[Outcome]:
        """Run spans that failed half-way; for packed models, whose layers may then hold some of their rows."""
        for span in spans:
            cast("SequenceKV", span.request.past).truncate(span.start)
        return self.run(spans)

    def _wave(self, spans: Sequence[RowSpan[Request]], number: int) -> ModelWave:
        groups = self._groups(spans)
        forwards: list[Forward | Replay]
        if self._packed:
            forwards = [self._replay(group, number) or self._packed_forward(group) for group in groups]
        else:
            forwards = [self._single(span) for span in spans]
        record = None
        if self._recorder is not None:
            record = self._recorder.wave([sum(span.n_rows for span in group) for group in groups])
        n_rows = n_context = 0
        for span in spans:
            n_rows += span.stop - span.start
            n_context += span.stop
        return ModelWave(forwards, self._experts, n_rows=n_rows, n_context=n_context, record=record)

    def _groups(self, spans: Sequence[RowSpan[Request]]) -> list[Sequence[RowSpan[Request]]]:
        """Return the spans of each forward of a wave, in their order."""
        if not self._packed:
            return [[span] for span in spans]
        return [spans] if self._rotary is None else [list(group) for _, group in groupby(spans, self._regime)]

    def _regime(self, span: RowSpan[Request]) -> bytes:
        assert self._rotary is not None
        return self._rotary.regime(_length(span))

    def _keep(self, record: WaveRecord, spans: Sequence[tuple[RowSpan[Request], bool]]) -> None:
        """Give each span that succeeded its recorded rows; they lie in the spans' order, however they travelled."""
        if not any(succeeded for _, succeeded in spans):
            return
        rows, start = record.rows(), 0
        for span, succeeded in spans:
            if succeeded and span.request.record is not None:
                span.request.record.parts.append(rows.part(start, start + span.n_rows))
            start += span.n_rows

    def _replay(self, spans: Sequence[RowSpan[Request]], number: int) -> "Replay | None":
        """Return a decoding step that was recorded; a past without a token has no layers to note one in."""
        if self.graphs is None or any(span.n_rows > 1 or not span.start for span in spans):
            return None
        pasts = [cast("SequenceKV", span.request.past) for span in spans]
        rows = [
            Row(past.run.start, span.request.tokens(span.start, span.stop)[0], span.start)
            for span, past in zip(spans, pasts, strict=True)
            if past.run is not None
        ]
        replay = self.graphs.replay(number, rows)
        if replay is not None:
            for span, past in zip(spans, pasts, strict=True):
                past.extend(span.stop)
        return replay

    def _packed_forward(self, spans: Sequence[RowSpan[Request]]) -> Forward:
        """All spans as one forward."""
        pasts: list[SequenceKV] = []
        lengths: list[int] = []
        n_seen = longest = 0
        for span in spans:
            pasts.append(cast("SequenceKV", span.request.past))
            lengths.append(span.stop - span.start)
            n_seen = max(n_seen, span.start)
            longest = max(longest, _length(span))
        cache = WaveCache(pasts, lengths, self._directness, n_seen)
        call = self._call(spans, cache)
        forward = Forward(lambda: call()[0])
        forward.wave, forward.length = cache, longest
        return forward

    def _single(self, span: RowSpan[Request]) -> Forward:
        """One sequence on its own, with transformers' cache."""
        call = self._call([span], cast("Cache | None", span.request.past))

        def keep_past() -> Tensor:
            logits, span.request.past = call()
            return logits

        return Forward(keep_past)

    def _call(self, spans: Sequence[RowSpan[Request]], cache: Cache | None) -> Callable[[], tuple[Tensor, Cache]]:
        """Return the model's forward over the spans: logits `[rows kept, V]` and the cache it used."""
        ids: list[int] = []
        positions: list[int] = []
        kept: list[int] = []
        for span in spans:
            ids += span.request.tokens(span.start, span.stop)
            positions += range(span.start, span.stop)
            if span.last:
                kept.append(len(ids) - 1)

        def call() -> tuple[Tensor, Cache]:
            keep = self._tensor(kept)
            extra: dict[str, Any] = {"logits_to_keep": keep} if self._keeps_rows else {}
            output = self._model(
                input_ids=self._tensor([ids]),
                position_ids=self._tensor([positions]),
                past_key_values=cache,
                use_cache=True,
                **extra,
            )
            logits: Tensor = output.logits[0]
            return logits if self._keeps_rows else logits[keep], output.past_key_values

        return call

    def _tensor(self, numbers: Sequence[Any]) -> Tensor:
        """Return whole numbers where the model is; from pinned memory, or the host would wait for their copy."""
        tensor = torch.tensor(numbers, dtype=torch.int64)
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _outcomes(self, spans: Sequence[RowSpan[Request]], wave: ModelWave) -> list[Outcome]:
        """Return each span's logits, or the error of its own experts, or the error that ended the wave."""
        if wave.error is not None:
            return [Outcome(error=wave.error) for _ in spans]
        rows = chain.from_iterable(wave.results)
        outcomes = [Outcome(next(rows) if span.last else None) for span in spans]
        for (forward, row), error in wave.failed.items():
            outcomes[self._span_of(spans, forward, row)].error = error
        return outcomes

    def _span_of(self, spans: Sequence[RowSpan[Request]], forward: int, row: int) -> int:
        groups = self._groups(spans)
        n_before = sum(len(group) for group in groups[:forward])
        for i, span in enumerate(groups[forward], n_before):
            if row < span.n_rows:
                return i
            row -= span.n_rows
        raise IndexError(f"the wave has no row {row}")


def _length(span: RowSpan[Request]) -> int:
    """Return the tokens of the forward that `generate` would run a span's rows in: a prompt counts whole."""
    return max(span.stop, span.request.n_prompt)
