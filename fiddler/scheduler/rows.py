"""Chooses the rows of the next step: every decoding sequence, and chunks of prompts beside them."""

from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Sequence(Protocol):
    """The parts of a request that assembling reads."""

    n_past: int

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        ...

    @property
    def prefilling(self) -> bool:
        """Whether part of the prompt has not been run yet."""
        ...


S = TypeVar("S", bound=Sequence)


@dataclass(frozen=True, slots=True)
class Span(Generic[S]):
    """Rows `start:stop` of one sequence; `last` where a token is picked from its last row."""

    request: S
    start: int
    stop: int
    last: bool

    @property
    def n_rows(self) -> int:
        """Rows of this sequence in the step."""
        return self.stop - self.start


def assemble(running: Iterable[S], chunk_tokens: int, *, chunked: bool) -> list[Span[S]]:
    """Choose the next step's rows.

    Decoding sequences always go. Prompts follow in order until `chunk_tokens` are used up; the last one is cut
    there if `chunked`, and otherwise goes whole, so at least one prompt always advances.
    """
    spans: list[Span[S]] = []
    prompts: list[S] = []
    for request in running:
        if request.prefilling:
            prompts.append(request)
        else:
            spans.append(Span(request, request.n_past, request.n_past + 1, last=True))
    room = chunk_tokens
    for request in prompts:
        if room <= 0:
            break
        stop = min(request.n_prompt, request.n_past + room) if chunked else request.n_prompt
        spans.append(Span(request, request.n_past, stop, last=stop == request.n_prompt))
        room -= stop - request.n_past
    return spans


def halves(spans: Ordered[Span[S]], *, cut: bool) -> list[list[Span[S]]]:
    """Return the spans as two waves with about as many rows each, or as one where there is nothing to halve.

    With `cut` the span in the middle is cut in two, the first part ending the first wave; its later rows attend
    to the earlier ones, so the second wave must not overtake the first.
    """
    half = sum(span.n_rows for span in spans) // 2
    first: list[Span[S]] = []
    second: list[Span[S]] = []
    for span in spans:
        room = half - sum(s.n_rows for s in first)
        if second or room <= 0:
            second.append(span)
        elif span.n_rows <= room:
            first.append(span)
        elif cut:
            middle = span.start + room
            first.append(Span(span.request, span.start, middle, last=False))
            second.append(Span(span.request, middle, span.stop, span.last))
        else:
            second.append(span)
    return [part for part in (first, second) if part]
