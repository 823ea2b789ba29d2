"""Numbers in documents come from files in `bench/results`: writes them there, or checks that they agree.

    python -m bench.documents            # rewrites what is shown in every document
    python -m bench.documents --check    # changes nothing; exits with 1 where something does not hold

In a document `<!--= {overhead_2core_epyc.hop_us.median:.0f} us -->133 us<!--/-->` shows what its template says
(`bench.values`); a mark that stands alone on its line holds a whole table. A number with a unit, or with a decimal
point, stands inside such marks or inside `<!--: REASON -->…<!--/-->` (`bench.spans` lists the reasons). The section
around it, or one that it is part of, names the machine that measured, or says that it was replayed or simulated.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.documents import tables, virtual_tables
from bench.documents.spans import Document, MarkError, Span
from bench.documents.unbound import unbound
from bench.values import HELPERS, Record, cited, evaluate, label, load

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "bench/README.md", "docs/*.md")
NOTEBOOK = "docs/experiments.md"
"""Where `notebook` may be a reason."""
NO_FILE = "no file"
"""What a section with such numbers must say."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a document that does not hold."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


@dataclass(frozen=True, slots=True)
class Checker:
    """Knows the results, and holds documents against them."""

    results: Mapping[str, Record]

    def problems(self, document: Document) -> list[Problem]:
        """Return everything that does not hold, by line."""
        try:
            found = [*self._spans(document), *((line, _unbound(number)) for line, number in unbound(document))]
        except MarkError as error:
            found = [(error.line, str(error))]
        return [Problem(document.name, line, text) for line, text in sorted(found)]

    def rewritten(self, document: Document) -> str:
        """Return the text with what every template says; what cannot be evaluated stays. Raises `MarkError`."""
        text = document.text
        for span in reversed(document.spans):
            if span.kind == "=":
                try:
                    shown = self.says(document, span)
                except Exception:
                    continue
                if not _agree(shown, document.shown(span)):
                    text = text[: span.shown_start] + shown + text[span.shown_end :]
        return text

    def says(self, document: Document, span: Span) -> str:
        """Return what should be shown, a table between empty lines; raises whatever the template raises."""
        names: dict[str, Any] = {**HELPERS, **tables.FUNCTIONS, **virtual_tables.FUNCTIONS, **self.results}
        shown = evaluate(span.head, names)
        return f"\n\n{shown}\n\n" if document.begins_a_line(span) else shown

    def _spans(self, document: Document) -> Iterator[tuple[int, str]]:
        for span in document.spans:
            if span.kind == "=":
                yield from ((span.line, text) for text in self._bound(document, span))
            elif span.head == "notebook":
                yield from ((span.line, text) for text in _notebook(document, span))

    def _bound(self, document: Document, span: Span) -> Iterator[str]:
        try:
            says = self.says(document, span)
        except Exception as error:
            yield f"`{span.head}` cannot be evaluated: {type(error).__name__}: {error}"
            return
        shown = document.shown(span)
        if not _agree(shown, says):
            yield _disagreement(shown, says)
        around = _plain("\n".join(document.around(span)))
        for where in dict.fromkeys(map(label, cited(span.head, self.results))):
            if where.casefold() not in around:
                yield f"neither its section nor those it is part of say where `{span.head}` was taken: {where!r}"


def _notebook(document: Document, span: Span) -> Iterator[str]:
    if document.name != NOTEBOOK:
        yield f"'notebook' is a reason only in {NOTEBOOK}"
    elif NO_FILE not in _plain(document.around(span)[0]):
        yield f"its section does not say that such numbers have {NO_FILE!r}"


def _unbound(number: str) -> str:
    return f"{number!r} is bound to no result, and not marked as anything else"


def _agree(shown: str, says: str) -> bool:
    """Compare as Markdown does: how lines are broken does not matter, but a table's lines do."""
    return _lines(shown) == _lines(says)


def _lines(text: str) -> list[str]:
    whole = [" ".join(line.split()) for line in text.strip().splitlines()]
    return whole if text.lstrip().startswith("|") else [" ".join(whole)]


def _disagreement(shown: str, says: str) -> str:
    """Say what differs; of a table, the first line that does."""
    pairs = [*zip(_lines(shown), _lines(says), strict=False)]
    first = next(((a, b) for a, b in pairs if a != b), None)
    if first is None:
        return f"shows {len(_lines(shown))} lines, the results say {len(_lines(says))}"
    return f"shows {first[0]!r}, the results say {first[1]!r}"


def _plain(text: str) -> str:
    """Return text without comments, emphasis, line breaks and capitals, to find words in."""
    return " ".join(re.sub(r"<!--.*?-->|[*`]", "", text, flags=re.DOTALL).split()).casefold()


def documents_of(root: Path = ROOT) -> list[Document]:
    """Read every document that is held to this."""
    files = [file for pattern in DOCUMENTS for file in sorted(root.glob(pattern))]
    return [Document(file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")) for file in files]


def write(checker: Checker, root: Path) -> Iterator[str]:
    """Rewrite the documents; yields the names of those that changed. Those with wrong marks are left alone."""
    for document in documents_of(root):
        try:
            text = checker.rewritten(document)
        except MarkError:
            continue
        if text != document.text:
            (root / document.name).write_text(text, encoding="utf-8")
            yield document.name


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.documents", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    checker = Checker(load())
    if not options.check:
        for name in write(checker, ROOT):
            print(f"{name}: rewritten")
    problems = [problem for document in documents_of(ROOT) for problem in checker.problems(document)]
    if problems:
        print(*problems, sep="\n")
        sys.exit(1)
