"""The engine's loop: takes submissions, runs steps, hands out tokens. It owns every request's state."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fiddler.engine.assembly import Rig
from fiddler.engine.waiting import PATIENCE_S, Found, Line, Reading, Readings
from fiddler.errors import (
    EngineClosedError,
    EngineError,
    EngineFailedError,
    FiddlerError,
    PromptError,
    RequestError,
)
from fiddler.lanes.queues import Mailbox
from fiddler.models.loaded import ServableModel
from fiddler.models.sampling import Sampler
from fiddler.scheduler.waves import RowSpan, assemble
from fiddler.steps.request import KvRoom, Request, Submission, past_bytes, token_limit
from fiddler.steps.step import Outcome
from fiddler.steps.stream import Admitted, Item
from fiddler.text.reading import TooMany
from fiddler.types import Statistics


@dataclass(frozen=True, slots=True)
class Submit:
    """A request was submitted; its prompt will be read."""

    submission: Submission
    reading: Reading


@dataclass(frozen=True, slots=True)
class Read:
    """A prompt was read, or refused."""

    submission: Submission
    found: Found


@dataclass(frozen=True, slots=True)
class End:
    """A caller left a request."""

    submission: Submission


@dataclass(frozen=True, slots=True)
class Close:
    """The engine must end."""


Message = Submit | Read | End | Close


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
        inbox: Mailbox[Message],
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
        self._readings = Readings(loaded.text, self._longest, self._tell)
        self._line = Line()
        self._running: list[Request] = []
        self._outbox: list[tuple[Submission, Item]] = []
        self._counters = _Counters()
        self._closing = False
        self.statistics = self._snapshot()
        """The state after the latest step; replaced whole, so any thread may read it."""

    def submit(self, submission: Submission) -> None:
        """Take a request, from any thread: its prompt is read at once, whatever the engine's thread is doing."""
        reading = Reading(submission)
        self._inbox.push(Submit(submission, reading))
        self._readings.put(reading)

    def serve(self, ready: Callable[[], None]) -> None:
        """Run until a `Close`; `ready` is called once requests may come. Raises the error that ends it early.

        However it ends, all requests are answered: running, waiting, and those that come too late.
        """
        cause: BaseException | None = None
        try:
            self._readings.start()
            ready()
            with torch.inference_mode():
                self._rig.runner.preload()
                while not self._closing:
                    self._turn()
        except BaseException as error:
            cause = error
        try:
            self._end(cause)
        finally:
            if cause is not None:  # rather than what came of it
                raise cause

    def _end(self, cause: BaseException | None) -> None:
        try:
            self._abandon(cause)
        finally:
            self._readings.close()
            self._rig.close()

    def _turn(self) -> None:
        """Take in what was pushed, waiting for it if there is nothing else to do, and run one step."""
        if not self._running and self._line.first() is None:
            found = self._inbox.receive_within(PATIENCE_S if self._line.held_up else None)
            self._apply(found)  # not in one line: bench puts another `_apply` there while this waits
        news = self._inbox.drain()
        self._apply(news)
        self._admit()
        self._start_over()
        if self._running and not self._closing:
            if news or self._outbox:  # before a step, which may take long
                self._publish()
            self._step()
        self._publish()

    def _apply(self, commands: Iterable[Message]) -> None:
        for command in commands:
            match command:
                case Submit(submission, reading):
                    self._line.join(submission, reading)
                case Read(submission, found):
                    self._found(submission, found)
                case End(submission):
                    self._leave(submission)
                case Close():
                    self._closing = True

    def _tell(self, reading: Reading, found: Found) -> None:
        """Push a reading's result to the loop; runs in a reading thread."""
        self._inbox.push(Read(reading.submission, found))

    def _found(self, submission: Submission, found: Found) -> None:
        """Open the request whose prompt was read, or end it with the prompt's error."""
        waiting = self._line.find(submission)
        if waiting is None:  # its caller left
            return
        try:
            if isinstance(found, FiddlerError):
                raise found
            waiting.request = self._open(submission, found)
        except FiddlerError as error:
            self._outbox.append((submission, error))
        except BaseException as error:  # one request's failure, a panic too, is not the engine's
            self._outbox.append((submission, _failure("the request could not be opened", error)))
        if waiting.request is None:
            self._line.leave(submission)

    def _leave(self, submission: Submission) -> None:
        n_before = len(self._line) + len(self._running)
        self._line.leave(submission)
        for request in [r for r in self._running if r.submission is submission]:
            self._drop(request)
        self._counters.n_cancelled += n_before - len(self._line) - len(self._running)

    def _admit(self) -> None:
        """Let requests run in the order they came in; one that has to wait for room is not overtaken."""
        while len(self._running) < self._max_running and (first := self._line.first()) is not None:
            try:
                if not self._enter(first):
                    return
                self._outbox.append((first.submission, Admitted()))
            except BaseException as error:  # one request's failure is not the engine's
                if first.room is not None:
                    self._room.release(first.room)
                self._outbox.append((first.submission, _failure("the request could not be opened", error)))
            self._line.leave(first.submission)

    @property
    def _longest(self) -> int:
        """Tokens a prompt and its completion can have at most."""
        max_context, n_room = self._loaded.resolved.max_context, self._room.n_tokens
        return max_context if n_room is None else min(max_context, n_room)

    def _open(self, submission: Submission, found: list[int] | TooMany) -> Request:
        options, resolved = submission.options, self._loaded.resolved
        n_prompt, counted = (found.n_tokens, found.counted) if isinstance(found, TooMany) else (len(found), True)
        n_limit = token_limit(n_prompt, options, resolved.max_context, self._room.n_tokens, counted=counted)
        assert not isinstance(found, TooMany)  # there is no room for it
        self._check_ids(found)
        return Request(
            submission=submission,
            prompt_ids=found,
            n_limit=n_limit,
            sampler=Sampler(options, found, n_prompt + n_limit),
            decoder=self._loaded.text.decoder(found, options.stop_strings),
        )

    def _enter(self, request: Request) -> bool:
        """Start a request if there is room for its keys and values; returns whether there was."""
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
        """Let requests forget their past where `generate` does, and run all their tokens again."""
        for request in tuple(self._running):
            try:
                if self._steps.starts_over(request):
                    request.start_over(self._steps.new_past(request.room.run if request.room is not None else None))
            except Exception as error:  # of the model's own hook
                self._fail([request], "a step failed", error)

    def _drop(self, request: Request) -> None:
        """Remove a running request, and release its room."""
        self._running.remove(request)
        if request.room is not None:
            self._room.release(request.room)

    def _check_ids(self, prompt_ids: list[int]) -> None:
        embeddings: Any = self._loaded.model.get_input_embeddings()
        n_vocabulary = embeddings.weight.shape[0]
        if max(prompt_ids) >= n_vocabulary:
            raise PromptError(f"token id {max(prompt_ids)} is outside the vocabulary of {n_vocabulary}")

    def _step(self) -> None:
        now_s = self._rig.lanes.now_s
        started_s = now_s()
        spans = assemble(self._running, self._chunk_tokens, chunked=self._loaded.packed)
        try:
            outcomes = self._relieved(spans, self._steps.run(spans))
            self._loaded.store.check()  # no token of weights that changed while they were read
        except Exception as error:
            self._fail([span.request for span in spans], "a step failed", error)
        else:
            for span, outcome in zip(spans, outcomes, strict=True):
                self._deliver(span, outcome)
        self._counters.n_steps += 1
        self._counters.step_s += now_s() - started_s

    def _relieved(self, spans: Sequence[RowSpan[Request]], outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """If a GPU's memory ran out, give slots up and run the failed spans again, once a step."""
        short = [i for i, outcome in enumerate(outcomes) if isinstance(outcome.error, torch.OutOfMemoryError)]
        if not short and not self._rig.side.work.short:
            return outcomes
        for i in short:  # or its frames would hold what the step had in memory
            error = outcomes[i].error
            assert error is not None
            error.__traceback__ = error.__context__ = None
        if not self._rig.relieve() or not self._loaded.packed or not short:
            return outcomes
        again = self._steps.run_again([spans[i] for i in short])
        relieved = dict(zip(short, again, strict=True))
        return [relieved.get(i, outcome) for i, outcome in enumerate(outcomes)]

    def _deliver(self, span: RowSpan[Request], outcome: Outcome) -> None:
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
                # A request's own error is told as it is, such as options that leave no token to pick.
                told = error if isinstance(error, RequestError) else _failure(what, error)
                self._outbox.append((request.submission, told))

    def _abandon(self, cause: BaseException | None) -> None:
        """End every request for good; `cause` is the error that ended the engine, or `None` if it was closed."""
        left = [r.submission for r in self._running] + [w.submission for w in self._line]
        left += [c.submission for c in self._inbox.seal(partial(_refuse, cause)) if isinstance(c, Submit)]
        self._counters.n_cancelled += len(left)
        try:
            for request in tuple(self._running):
                self._drop(request)
            for waiting in self._line:
                self._line.leave(waiting.submission)
            self._publish()  # the tokens that were made come first
        finally:
            for submission in left:
                submission.channel.push(ended(cause))

    def _publish(self) -> None:
        """Publish a step's outcome: the statistics first, so that a token that has arrived is counted already."""
        self.statistics = self._snapshot()
        for submission, item in self._outbox:
            submission.channel.push(item)
        self._outbox.clear()

    def _snapshot(self) -> Statistics:
        counters, rig = self._counters, self._rig
        decided, n_slots = rig.scheduler.counters, rig.scheduler.cache.n_slots
        kv_bytes = 0
        for request in self._running:
            kv_bytes += past_bytes(request.past)
        return Statistics(
            n_requests=counters.n_requests,
            n_finished=counters.n_finished,
            n_failed=counters.n_failed,
            n_cancelled=counters.n_cancelled,
            n_running=len(self._running),
            n_waiting=len(self._line),
            n_steps=counters.n_steps,
            n_prompt_tokens=counters.n_prompt_tokens,
            n_new_tokens=counters.n_new_tokens,
            kv_bytes=kv_bytes,
            n_kv_tokens=self._room.n_reserved,
            **{lane: counted.snapshot() for lane, counted in rig.side.work.counters.items()},
            n_slots=n_slots,
            n_slots_used=n_slots - rig.scheduler.cache.n_free,
            n_hits=decided.n_hits,
            n_fetches=decided.n_fetches,
            n_promotions=decided.n_promotions,
            prefetch=rig.scheduler.prefetched,
            n_fallbacks=decided.n_fallbacks,
            dead_lanes=tuple(rig.scheduler.dead),
            prediction_error=decided.median_error(),
            step_s=counters.step_s,
        )


def _refuse(cause: BaseException | None, command: Message) -> None:
    """Answer a submission that came after the engine's end, in the thread that pushed it."""
    if isinstance(command, Submit):
        command.submission.channel.push(ended(cause))


def ended(cause: BaseException | None) -> EngineError:
    """Return the error for requests after the engine's end; `cause` is the error that ended it, if any."""
    if cause is None:
        return EngineClosedError("the engine was closed while the request was in flight")
    return _failure("the engine has ended", cause)


def _failure(what: str, error: BaseException) -> EngineFailedError:
    failure = EngineFailedError(f"{what}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
