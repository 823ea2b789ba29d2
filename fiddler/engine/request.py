"""One request's state, from its prompt to its last token. The engine's thread is its only writer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import Cache

from fiddler.engine.kv_room import Reserved
from fiddler.engine.recorder import SequenceRecord
from fiddler.engine.stream import Item
from fiddler.errors import PromptError
from fiddler.lanes.channel import Channel
from fiddler.models.kv import SequenceKV
from fiddler.models.prompts import Prompt
from fiddler.models.sampling import Sampler, SamplingOptions
from fiddler.models.text import Decoder
from fiddler.types import FinishReason, Token, Usage


@dataclass(frozen=True, slots=True, eq=False)
class Submission:
    """A request as it was asked for, before anything was checked that needs the model."""

    prompt: Prompt
    options: SamplingOptions
    channel: Channel[Item]


@dataclass(slots=True, eq=False)
class Request:
    """A request whose prompt was read; it runs once it has room for its keys and values."""

    submission: Submission
    prompt_ids: list[int]
    n_limit: int
    """Tokens it may make."""
    sampler: Sampler
    decoder: Decoder
    past: SequenceKV | Cache | None = None
    room: Reserved | None = None
    """Its room for keys and values, as long as it runs."""
    record: SequenceRecord | None = None
    """Where its routing is recorded, if it is."""
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
        """Run all tokens again, as one prompt, into an empty `past`; what was recorded of them is recorded anew."""
        self.past, self.n_past = past, 0
        self.n_again = len(self.prompt_ids) + len(self.made)
        if self.record is not None:
            self.record.parts = []

    def accept(self, logits: Tensor) -> Token:
        """Pick the next token from its logits `[V]`; the returned token is the last if it has a finish reason."""
        options = self.submission.options
        token_id, logprob = self.sampler.pick(logits, [*self.prompt_ids, *self.made])
        self.made.append(token_id)
        text, stopped = self.decoder.push(token_id)
        reason: FinishReason | None = None
        if stopped or token_id in options.eos_token_ids:
            reason = "stop"
        elif len(self.made) >= self.n_limit:
            reason = "length"
        if reason is None:
            return Token(token_id, text, logprob)
        usage = Usage(len(self.prompt_ids), len(self.made))
        return Token(token_id, text + self.decoder.flush(), logprob, reason, usage)


def token_limit(n_prompt: int, options: SamplingOptions, max_context: int, kv_tokens: int | None = None) -> int:
    """Return how many tokens a request may make: as many as there is room for, where it does not say.

    `kv_tokens` is the room for keys and values of all requests together, `None` without limit. Raises `PromptError`
    where the context or that room cannot hold the request, naming the smaller.
    """
    longest, name, remedy = max_context, f"the context of {max_context}", ""
    if kv_tokens is not None and kv_tokens < max_context:
        longest, name, remedy = kv_tokens, f"kv_tokens={kv_tokens}", ", or set kv_tokens higher"
    room = longest - n_prompt
    wanted = options.max_new_tokens
    if wanted is None and options.max_length is not None:
        wanted = options.max_length - n_prompt
    if room < 1:
        raise PromptError(
            f"the prompt is too long: {n_prompt} tokens leave no room within {name}; shorten it{remedy}"
        )
    if wanted is not None and wanted < 1:
        raise PromptError(
            f"the prompt is too long: {n_prompt} tokens leave no room within {options.max_length}; shorten it"
        )
    if wanted is not None and wanted > room:
        raise PromptError(
            f"a prompt of {n_prompt} tokens and max_new_tokens={wanted} exceed {name}; "
            f"set max_new_tokens to at most {room}{remedy}"
        )
    return room if wanted is None else wanted


def past_bytes(past: Any) -> int:
    """Return the bytes of keys and values (and other state) a sequence holds."""
    if isinstance(past, SequenceKV):
        return past.nbytes
    layers = getattr(past, "layers", ())
    tensors = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))
