"""Which rows travel in the next step: every decoding sequence, and prompt chunks beside them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Sequence(Protocol):
    """What assembling needs to know of a request."""

    prompt_ids: list[int]
    n_past: int

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
        n_prompt = len(request.prompt_ids)
        stop = min(n_prompt, request.n_past + room) if chunked else n_prompt
        spans.append(Span(request, request.n_past, stop, last=stop == n_prompt))
        room -= stop - request.n_past
    return spans
