"""The engine's thread: takes submissions, runs steps, hands out tokens. Owner of every request's state."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fiddler.engine.assemble import Span, assemble
from fiddler.engine.forward import Outcome
from fiddler.engine.kv_room import KvRoom
from fiddler.engine.request import Request, Submission, past_bytes, token_limit
from fiddler.engine.rig import Rig
from fiddler.engine.stream import Admitted, Item
from fiddler.errors import EngineClosedError, EngineError, EngineFailedError, FiddlerError, PromptError
from fiddler.lanes.channel import Channel
from fiddler.models.loaded import ServableModel
from fiddler.models.sampling import Sampler
from fiddler.types import Statistics


@dataclass(frozen=True, slots=True)
class Submit:
    """A caller wants a request run."""

    submission: Submission


@dataclass(frozen=True, slots=True)
class End:
    """A caller left a request."""

    submission: Submission


@dataclass(frozen=True, slots=True)
class Close:
    """The engine is to end."""


Command = Submit | End | Close


@dataclass(slots=True)
class _Counters:
    n_requests: int = 0
    n_finished: int = 0
    n_failed: int = 0
    n_cancelled: int = 0
    n_steps: int = 0
    n_prompt_tokens: int = 0
    n_new_tokens: int = 0
    step_s: float = 0.0


class EngineLoop:
    """Serves requests until told to close; every method but `statistics` belongs to the engine's thread."""

    def __init__(
        self,
        loaded: ServableModel,
        rig: Rig,
        inbox: Channel[Command],
        *,
        max_running: int,
        chunk_tokens: int,
    ) -> None:
        self._loaded = loaded
        self._rig = rig
        self._inbox = inbox
        self._max_running = max_running
        self._chunk_tokens = chunk_tokens
        self._steps = rig.steps
        self._room = KvRoom(loaded.resolved.kv_tokens, rig.steps.arena)
        self.trace = rig.trace
        self.recorder = rig.recorder
        self._waiting: deque[Submission] = deque()
        self._next: Request | None = None  # the first that waits, opened, if it waits for room
        self._running: list[Request] = []
        self._outbox: list[tuple[Submission, Item]] = []
        self._counters = _Counters()
        self._closing = False
        self.statistics = self._snapshot()
        """The state after the latest step; replaced whole, so any thread may read it."""

    async def serve(self, ready: Callable[[], None]) -> None:
        """Run until a `Close`; `ready` is called once requests may come. Raises what ends it before its time.

        However it ends, everybody is told: requests in flight, those that wait, and those that come too late.
        """
        cause: BaseException | None = None
        try:
            ready()
            with torch.inference_mode():
                await self._rig.runner.preload()
                while not self._closing:
                    await self._turn()
        except BaseException as error:
            cause = error
        try:
            await self._end(cause)
        finally:
            if cause is not None:  # rather than what came of it
                raise cause

    async def _end(self, cause: BaseException | None) -> None:
        try:
            self._abandon(cause)
        finally:
            await self._rig.aclose()

    async def _turn(self) -> None:
        """Take what came in, waiting for it if there is nothing else to do, and run one step."""
        if not self._running and not self._waiting:
            command = await self._inbox.receive()
            self._apply([command])
        self._apply(self._inbox.drain())
        self._admit()
        self._start_over()
        self._publish()
        if self._running and not self._closing:
            await self._step()
        self._publish()

    def _apply(self, commands: Iterable[Command]) -> None:
        for command in commands:
            match command:
                case Submit(submission):
                    self._waiting.append(submission)
                case End(submission):
                    self._leave(submission)
                case Close():
                    self._closing = True

    def _leave(self, submission: Submission) -> None:
        n_before = len(self._waiting) + len(self._running)
        self._waiting = deque(s for s in self._waiting if s is not submission)
        for request in [r for r in self._running if r.submission is submission]:
            self._drop(request)
        self._counters.n_cancelled += n_before - len(self._waiting) - len(self._running)

    def _admit(self) -> None:
        """Let requests run in the order they came in; one that has to wait for room is not overtaken."""
        while self._waiting and len(self._running) < self._max_running:
            submission = self._waiting[0]
            try:
                if self._next is None or self._next.submission is not submission:
                    self._next = self._open(submission)
                if not self._enter(self._next):
                    return
                self._outbox.append((submission, Admitted()))
            except FiddlerError as error:
                self._outbox.append((submission, error))
            except BaseException as error:  # a tokenizer's own failure, a panic too, is one request's
                self._outbox.append((submission, _failure("the request could not be opened", error)))
            self._waiting.popleft()
            self._next = None

    def _open(self, submission: Submission) -> Request:
        options = submission.options
        text = self._loaded.text
        prompt_ids = text.encode(submission.prompt)
        self._check_ids(prompt_ids)
        max_context = self._loaded.resolved.max_context
        return Request(
            submission=submission,
            prompt_ids=prompt_ids,
            n_limit=token_limit(len(prompt_ids), options, max_context, self._room.n_tokens),
            sampler=Sampler(options),
            decoder=text.decoder(prompt_ids, options.stop_strings),
        )

    def _enter(self, request: Request) -> bool:
        """Let a request run if there is room for its keys and values."""
        request.room = self._room.reserve(request.n_most)
        if request.room is None:
            return False
        request.past = self._steps.new_past(request.room.run)
        if self.recorder is not None:  # a refused request takes no number
            request.record = self.recorder.open(request.n_prompt)
        self._running.append(request)
        self._counters.n_requests += 1
        return True

    def _start_over(self) -> None:
        """Let requests forget their past where `generate` would, and run all their tokens again."""
        for request in tuple(self._running):
            try:
                if self._steps.starts_over(request):
                    request.start_over(self._steps.new_past(request.room.run if request.room is not None else None))
            except Exception as error:  # of the model's own hook
                self._fail([request], "a step failed", error)

    def _drop(self, request: Request) -> None:
        """Let a request go, however it ended, and its room with it."""
        self._running.remove(request)
        if request.room is not None:
            self._room.release(request.room)

    def _check_ids(self, prompt_ids: list[int]) -> None:
        embeddings: Any = self._loaded.model.get_input_embeddings()
        n_vocabulary = embeddings.weight.shape[0]
        if max(prompt_ids) >= n_vocabulary:
            raise PromptError(f"token id {max(prompt_ids)} is outside the vocabulary of {n_vocabulary}")

    async def _step(self) -> None:
        now_s = self._rig.lanes.now_s
        started_s = now_s()
        spans = assemble(self._running, self._chunk_tokens, chunked=self._loaded.packed)
        try:
            outcomes = await self._relieved(spans, await self._steps.run(spans))
        except Exception as error:
            self._fail([span.request for span in spans], "a step failed", error)
        else:
            for span, outcome in zip(spans, outcomes, strict=True):
                self._deliver(span, outcome)
        self._counters.n_steps += 1
        self._counters.step_s += now_s() - started_s

    async def _relieved(self, spans: Sequence[Span[Request]], outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """Where a GPU's memory ran out, have fewer slots, and run the spans that failed again, once a step."""
        short = [i for i, outcome in enumerate(outcomes) if isinstance(outcome.error, torch.OutOfMemoryError)]
        if not short and not self._rig.side.work.short:
            return outcomes
        for i in short:  # or its frames would hold what the step had in memory
            error = outcomes[i].error
            assert error is not None
            error.__traceback__ = error.__context__ = None
        if not await self._rig.relieve() or not self._loaded.packed or not short:
            return outcomes
        again = await self._steps.run_again([spans[i] for i in short])
        relieved = dict(zip(short, again, strict=True))
        return [relieved.get(i, outcome) for i, outcome in enumerate(outcomes)]

    def _deliver(self, span: Span[Request], outcome: Outcome) -> None:
        request = span.request
        if outcome.error is not None:
            self._fail([request], "a step failed", outcome.error)
            return
        if not request.made:
            self._counters.n_prompt_tokens += span.n_rows
        request.n_past = span.stop
        if outcome.logits is None:
            return
        try:
            token = request.accept(outcome.logits)
        except BaseException as error:  # of one request's options or text, which concern no other
            self._fail([request], "no token could be picked", error)
            return
        self._counters.n_new_tokens += 1
        if token.finish_reason is not None:
            self._drop(request)
            self._counters.n_finished += 1
        self._outbox.append((request.submission, token))

    def _fail(self, requests: Iterable[Request], what: str, error: BaseException) -> None:
        """End the requests an error concerns; their memory goes with them, the others go on."""
        for request in requests:
            if request in self._running:
                self._drop(request)
                self._counters.n_failed += 1
                self._outbox.append((request.submission, _failure(what, error)))

    def _abandon(self, cause: BaseException | None) -> None:
        """End every request, for good; `cause` is what ended the engine, if it was not closed."""
        left = [*(r.submission for r in self._running), *self._waiting]
        left += [c.submission for c in self._inbox.seal(partial(_refuse, cause)) if isinstance(c, Submit)]
        self._counters.n_cancelled += len(left)
        try:
            for request in tuple(self._running):
                self._drop(request)
            self._waiting.clear()
            self._publish()  # the tokens that were made come first
        finally:
            for submission in left:
                submission.channel.push(ended(cause))

    def _publish(self) -> None:
        """Make a step's outcome visible: the statistics first, so that whoever has a token finds it counted."""
        self.statistics = self._snapshot()
        for submission, item in self._outbox:
            submission.channel.push(item)
        self._outbox.clear()

    def _snapshot(self) -> Statistics:
        counters, rig = self._counters, self._rig
        decided = rig.scheduler.counters
        return Statistics(
            n_requests=counters.n_requests,
            n_finished=counters.n_finished,
            n_failed=counters.n_failed,
            n_cancelled=counters.n_cancelled,
            n_running=len(self._running),
            n_waiting=len(self._waiting),
            n_steps=counters.n_steps,
            n_prompt_tokens=counters.n_prompt_tokens,
            n_new_tokens=counters.n_new_tokens,
            kv_bytes=sum(past_bytes(request.past) for request in self._running),
            n_kv_tokens=self._room.n_reserved,
            **{lane: counted.snapshot() for lane, counted in rig.side.work.counters.items()},
            n_slots=rig.scheduler.cache.n_slots,
            n_slots_used=rig.scheduler.cache.n_slots - rig.scheduler.cache.n_free,
            n_hits=decided.n_hits,
            n_fetches=decided.n_fetches,
            n_promotions=decided.n_promotions,
            prefetch=rig.scheduler.prefetched,
            n_fallbacks=decided.n_fallbacks,
            dead_lanes=tuple(rig.scheduler.dead),
            prediction_error=decided.median_error(),
            step_s=counters.step_s,
        )


def _refuse(cause: BaseException | None, command: Command) -> None:
    """Answer who submits to an engine that has ended, whichever thread he is in."""
    if isinstance(command, Submit):
        command.submission.channel.push(ended(cause))


def ended(cause: BaseException | None) -> EngineError:
    """Return the error of whoever wants something of an engine that was closed, or that `cause` has ended."""
    if cause is None:
        return EngineClosedError("the engine was closed while the request was in flight")
    return _failure("the engine has ended", cause)


def _failure(what: str, error: BaseException) -> EngineFailedError:
    failure = EngineFailedError(f"{what}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
