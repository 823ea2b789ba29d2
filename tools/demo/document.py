"""The unit that every text source yields."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fact:
    """A question subject and its answer, from which chat turns are made."""

    kind: str
    subject: str
    answer: str


@dataclass(frozen=True)
class Document:
    """A piece of text that is trained on, or held out, as a whole.

    ``group`` names what must stay together when text is held out (a book, a package, a run of neighbouring
    entries), so that near copies do not end up on both sides.
    """

    domain: str
    name: str
    group: str
    text: str
    facts: tuple[Fact, ...] = field(default=())
