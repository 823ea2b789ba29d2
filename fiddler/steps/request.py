"""One request's state, from its prompt to its last token, and the room for keys and values that requests share.

The engine's thread is the only writer of `Request`, and the engine's loop the only user of `KvRoom`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from torch import Tensor
from transformers import Cache

from fiddler.errors import GenerationError, PromptError
from fiddler.given import shown
from fiddler.lanes.queues import Channel
from fiddler.models.generation import SamplingOptions
from fiddler.models.kv import KvArena, Run, SequenceKV
from fiddler.models.sampling import Sampler
from fiddler.steps.recorder import SequenceRecord
from fiddler.steps.stream import Item
from fiddler.text.decoder import Decoder
from fiddler.text.prompts import Bound, Copied
from fiddler.types import FinishReason, Token, Usage


@dataclass(frozen=True, slots=True, eq=False)
class Reserved:
    """Room for the keys and values of one request, for as long as it runs."""

    n_tokens: int
    run: Run | None
    """Its place in the arena, if there is one."""


class KvRoom:
    """Room for `n_tokens` tokens in all, which lie in `arena` if there is one; without a limit if `None`."""

    def __init__(self, n_tokens: int | None, arena: KvArena | None = None) -> None:
        assert arena is None or arena.n_tokens == n_tokens
        self.n_tokens = n_tokens
        self.n_reserved = 0
        """Tokens that are reserved now."""
        self._arena = arena
        self._held: set[Reserved] = set()

    def reserve(self, n_tokens: int) -> Reserved | None:
        """Reserve room for one request, or return `None` until others have left.

        It never asks for more than there is in all, or it would wait for ever: `engine.request.token_limit`.
        """
        assert self.n_tokens is None or n_tokens <= self.n_tokens
        if self.n_tokens is not None and self.n_reserved + n_tokens > self.n_tokens:
            return None
        run = self._arena.reserve(n_tokens) if self._arena is not None else None
        if self._arena is not None and run is None:  # enough in all, but in pieces
            return None
        reserved = Reserved(n_tokens, run)
        self._held.add(reserved)
        self.n_reserved += n_tokens
        return reserved

    def release(self, reserved: Reserved) -> None:
        """Take back a request's room. Raises `KeyError` for room that is not reserved."""
        self._held.remove(reserved)
        self.n_reserved -= reserved.n_tokens
        if reserved.run is not None:
            reserved.run.arena.release(reserved.run)

    def check(self) -> None:
        """Raise `AssertionError` unless the books agree with the requests and the arena."""
        assert self.n_reserved == sum(reserved.n_tokens for reserved in self._held)
        assert self.n_tokens is None or self.n_reserved <= self.n_tokens
        if self._arena is not None:
            self._arena.check()
            assert self._arena.n_tokens - self._arena.n_free == self.n_reserved


@dataclass(frozen=True, slots=True, eq=False)
class Submission:
    """A request as it was asked for, before anything was checked that needs the model."""

    prompt: Copied
    options: SamplingOptions
    channel: Channel[Item]


@dataclass(slots=True, eq=False)
class Request:
    """A request whose prompt was read; it runs once it has room for its keys and values."""

    submission: Submission
    prompt_ids: list[int]
    n_limit: int
    """Tokens that it may make."""
    sampler: Sampler
    decoder: Decoder
    past: SequenceKV | Cache | None = None
    room: Reserved | None = None
    """Its room for keys and values, as long as it runs."""
    record: SequenceRecord | None = None
    """Record of its routing, if routing is recorded."""
    n_past: int = 0
    """Tokens whose keys and values are in `past`."""
    made: list[int] = field(default_factory=list)
    """Token ids made so far."""
    n_again: int = 0
    """Tokens that are run a second time, as one prompt."""

    @property
    def n_prompt(self) -> int:
        """Tokens that are run as a prompt: the prompt's own, or all there were when it started over."""
        return max(len(self.prompt_ids), self.n_again)

    @property
    def n_most(self) -> int:
        """Tokens it can come to have, prompt and made together."""
        return len(self.prompt_ids) + self.n_limit

    @property
    def prefilling(self) -> bool:
        """Whether part of the prompt has not been run yet."""
        return self.n_past < self.n_prompt

    def tokens(self, start: int, stop: int) -> Sequence[int]:
        """Return the ids of the sequence, prompt and made tokens together, from `start` to `stop`."""
        n_prompt = len(self.prompt_ids)
        if start >= n_prompt:
            return self.made[start - n_prompt : stop - n_prompt]
        if stop <= n_prompt:
            return self.prompt_ids[start:stop]
        return [*self.prompt_ids[start:], *self.made[: stop - n_prompt]]

    def start_over(self, past: SequenceKV | None) -> None:
        """Run all tokens again, as one prompt, into an empty `past`; their routing is recorded anew."""
        self.past, self.n_past = past, 0
        self.n_again = len(self.prompt_ids) + len(self.made)
        if self.record is not None:
            self.record.parts = []

    def accept(self, logits: Tensor) -> Token:
        """Pick the next token from its logits `[V]`; the returned token is the last if it has a finish reason."""
        options = self.submission.options
        token_id, logprob = self.sampler.pick(logits, [*self.prompt_ids, *self.made])
        made_s = perf_counter()
        self.made.append(token_id)
        text, stopped = self.decoder.push(token_id)
        reason: FinishReason | None = None
        if stopped or token_id in options.eos_token_ids:
            reason = "stop"
        elif len(self.made) >= self.n_limit:
            reason = "length"
        if reason is None:
            return Token(token_id, text, logprob, made_s=made_s)
        usage = Usage(len(self.prompt_ids), len(self.made))
        return Token(token_id, text + self.decoder.flush(), logprob, reason, usage, made_s)


def token_limit(
    n_prompt: int,
    options: SamplingOptions,
    max_context: int,
    kv_tokens: int | None = None,
    *,
    counted: bool = True,
) -> int:
    """Return how many tokens a request may make: as many as there is room for, where nothing says less.

    A length that the checkpoint sets is no more than a limit, and none for a prompt that alone exceeds it, nor for
    the least that a request asks for. A length that the request asks for is met or refused; where its most is less
    than its least, the most counts, as in transformers. `kv_tokens` is the room for keys and values of all requests
    together, `None` without limit. A prompt not `counted` has `n_prompt` tokens or more. Raises `PromptError` where
    the context or that room cannot hold the prompt and the most that is asked for, naming the smaller, and
    `GenerationError` where it cannot hold the least.
    """
    bound = Bound.of(max_context, kv_tokens)
    longest, name, remedy = bound.longest, bound.name, bound.remedy
    room = longest - n_prompt
    n = f"{n_prompt}" if counted else f"at least {n_prompt}"
    if room < 1:
        raise bound.exceeded(n_prompt, counted=counted)
    least = _asked_least(n_prompt, options, longest, name)
    new, total = options.max_new_tokens, options.max_length
    wanted = total - n_prompt if total is not None else new
    if wanted is None:
        return room
    if options.asked.isdisjoint(("max_new_tokens", "max_length")):
        return min(max(wanted, least), room) if wanted > 0 else room
    if wanted < 1:
        raise PromptError(
            f"the prompt is too long: {n} tokens leave no room within max_length={total}; "
            "shorten it, or set max_length higher"
        )
    if wanted > room and total is not None:
        raise PromptError(f"max_length={shown(total)} exceeds {name}; set max_length to at most {longest}{remedy}")
    if wanted > room:
        raise PromptError(
            f"a prompt of {n_prompt} tokens and max_new_tokens={shown(new)} exceed {name}; "
            f"set max_new_tokens to at most {room}{remedy}"
        )
    return wanted


def _asked_least(n_prompt: int, options: SamplingOptions, longest: int, name: str) -> int:
    """Return how many new tokens a request asks for at least; 0 where it does not say."""
    for option, n_before in (("min_new_tokens", n_prompt), ("min_length", 0)):
        least = options.processors.get(option, 0)
        if option in options.asked and least + n_before > longest:
            raise GenerationError(
                f"{option}={shown(least)} exceeds {name}; set {option} to at most {longest - n_before}"
            )
        if option in options.asked and least:
            return int(least + n_before - n_prompt)
    return 0


def past_bytes(past: Any) -> int:
    """Return the bytes of keys and values (and other state) a sequence holds."""
    if isinstance(past, SequenceKV):
        return past.nbytes
    layers = getattr(past, "layers", ())
    tensors = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))
