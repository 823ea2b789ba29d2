"""The marks in a Markdown file that say where a number comes from.

`<!--= TEMPLATE -->shown<!--/-->` binds what is shown to results (`bench.values` evaluates the template), and
`<!--: REASON -->…<!--/-->` says why numbers are bound to nothing. Marks inside code are text like any other.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

REASONS = {
    "published": "somebody else's figure, which the text cites",
    "chosen": "a constant of the design, or a setting",
    "goal": "what we set out to reach",
    "notebook": "seen in a run whose output was not kept",
}

FENCE = r"(?P<fence>^ *(?P<ticks>```+|~~~+)[^\n]*\n.*?(?:^ *(?P=ticks)|\Z))"
CODE = r"(?P<code>(?<!`)(?P<tick>`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)(?P=tick)(?!`))"
_TOKEN = re.compile(
    rf"{FENCE}|{CODE}|(?P<open><!--(?P<mark>[=:])(?P<head>.*?)-->)|(?P<close><!--/-->)", re.DOTALL | re.MULTILINE
)
_HEADING = re.compile(rf"{FENCE}|^(?P<level>#+) [^\n]*", re.DOTALL | re.MULTILINE)
_STARTS_A_LINE = re.compile(r"(?:\s|[*+-]\s|>|\d+\.\s)*")
"""What may stand before a block of Markdown on its first line."""


class MarkError(ValueError):
    """A mark that cannot be read, or would not show well; `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True, slots=True)
class Span:
    """Text between two marks. Offsets are into the document's text."""

    kind: Literal["=", ":"]
    head: str
    """The template, or the reason."""
    start: int
    shown_start: int
    shown_end: int
    end: int
    line: int


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it before the next heading of any level; level 0 is before all headings."""

    level: int
    start: int
    end: int


@dataclass(frozen=True)
class Document:
    """A Markdown text and its marks; raises `MarkError` for marks that are wrong."""

    name: str
    text: str

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Every pair of marks, in order."""
        return tuple(self._pairs())

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """Every section, in order."""
        heads = [found for found in _HEADING.finditer(self.text) if found["level"]]
        starts = [0, *(found.start() for found in heads), len(self.text)]
        levels = [0, *(len(found["level"]) for found in heads)]
        return tuple(Section(*values) for values in zip(levels, starts, starts[1:], strict=False))

    def line(self, offset: int) -> int:
        """Return the number of the line that an offset is in."""
        return self.text.count("\n", 0, offset) + 1

    def shown(self, span: Span) -> str:
        """Return what a reader sees of a span."""
        return self.text[span.shown_start : span.shown_end]

    def begins_a_line(self, span: Span) -> bool:
        """Whether a span holds blocks of its own, as a table is."""
        return self.text[: span.start].endswith("\n") or span.start == 0

    def around(self, span: Span) -> list[str]:
        """Return the text of the section that a span is in, and then of those it is part of."""
        own = next(i for i, section in enumerate(self.sections) if section.start <= span.start < section.end)
        level, found = self.sections[own].level + 1, []
        for section in reversed(self.sections[: own + 1]):
            if section.level < level:
                level = section.level
                found.append(self.text[section.start : section.end])
        return found

    def _pairs(self) -> Iterator[Span]:
        opened: re.Match[str] | None = None
        for token in _TOKEN.finditer(self.text):
            if not token["open"] and not token["close"]:
                continue
            line = self.line(token.start())
            self._check_place(token, line)
            if token["open"]:
                if opened is not None:
                    raise MarkError(line, f"a mark inside that of line {self.line(opened.start())}")
                _check_head(token, line)
                opened = token
            elif opened is None:
                raise MarkError(line, "this mark ends nothing")
            else:
                yield self._span(opened, token)
                opened = None
        if opened is not None:
            raise MarkError(self.line(opened.start()), "this mark is never ended by <!--/-->")

    def _span(self, opened: re.Match[str], closed: re.Match[str]) -> Span:
        head = " ".join(opened["head"].split())
        kind: Literal["=", ":"] = "=" if opened["mark"] == "=" else ":"
        line = self.line(opened.start())
        return Span(kind, head, opened.start(), opened.end(), closed.start(), closed.end(), line)

    def _check_place(self, token: re.Match[str], line: int) -> None:
        """Refuse what Markdown would show as raw HTML: a comment that begins a line ends the paragraph there."""
        before = self.text.rfind("\n", 0, token.start()) + 1
        after = self.text.find("\n", token.end())
        prefix, rest = self.text[before : token.start()], self.text[token.end() : None if after < 0 else after]
        if prefix.startswith("|") and "|" in token[0]:
            raise MarkError(line, "a '|' in a mark ends the table's cell")
        if not _STARTS_A_LINE.fullmatch(prefix):
            return
        above = self.text[:before].endswith("\n\n") or not before
        below = after < 0 or self.text[after + 1 : after + 2] in ("\n", "")
        if rest.strip() or not above or not below:
            raise MarkError(line, "a mark that begins a line stands alone there, between empty lines")


def _check_head(token: re.Match[str], line: int) -> None:
    if "--" in token["head"]:
        raise MarkError(line, "'--' may not stand in a comment")
    if token["mark"] == ":" and token["head"].strip() not in REASONS:
        raise MarkError(line, f"{token['head'].strip()!r} is no reason: {', '.join(REASONS)}")
