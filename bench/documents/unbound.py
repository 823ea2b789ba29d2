"""Finds numbers that nobody vouches for: outside every mark, with a unit of performance or a decimal point."""

import re
from collections.abc import Iterator

from bench.documents.spans import CODE, FENCE, Document

SIGN = r"(?<![\w.,/·-])[\N{MINUS SIGN}+-]?"
NUMBER = rf"{SIGN}\d[\d,]*(?:\.\d+)?"
RATE = r"tok(?:en)?s?/s|[kMGT]i?B(?:/s)?|[GT]?FLOPS?/s|[mnu\N{MICRO SIGN}]s"
UNIT = (
    rf"(?:{RATE}|s|x|\N{{MULTIPLICATION SIGN}}|times|tokens (?:a|per) second|bits?(?:/| per | a )byte)"
    r"(?![\w'])(?!\s*\d)|%(?! (?:of the experts )?(?:resident|cached))"
)
"""A size by a size is a shape, and so much resident or cached a setting."""
WITH_UNIT = re.compile(rf"{NUMBER} ?(?:{UNIT})")
DECIMAL = re.compile(rf"{SIGN}\d+\.\d+(?![\w.])")
BEGINS_A_RANGE = re.compile(rf"{NUMBER} to (?=\x00)")
"""Half of `10 to 60 ms`, whose other half is marked."""
HEADER_UNIT = re.compile(rf"%|\N{{MULTIPLICATION SIGN}}|(?<!\w)(?:{RATE})(?!\w)")
TABLE = re.compile(r"^(?P<header>\|.*)\n\|[ :|-]+\n(?P<rows>(?:\|.*(?:\n|\Z))*)", re.MULTILINE)

_HIDDEN = re.compile(
    rf"{FENCE}|{CODE}|<!--.*?-->|\]\([^)]*\)|https?://\S+"
    r"|\b(?:Python|torch|transformers|PCIe|CUDA|WordNet) \d+(?:\.\d+)+|Apache-2\.0|\d+\.\d+\.\d+",
    re.DOTALL | re.MULTILINE,
)
"""What holds no measurement: code, comments, links, versions."""


def unbound(document: Document) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each number that is bound to nothing and not marked."""
    text = _visible(document)
    found: dict[int, str] = {}
    for pattern in (BEGINS_A_RANGE, DECIMAL, WITH_UNIT):
        found |= {match.start(): match[0].strip() for match in pattern.finditer(text)}
    found |= {start: cell for start, cell in _in_tables(text) if start not in found}
    for start, number in sorted(found.items()):
        yield document.line(start), number


def _visible(document: Document) -> str:
    """Return the text with what needs no mark blanked out, marked text as zeros; offsets and lines stay."""
    text = document.text
    for span in document.spans:
        text = text[: span.start] + _blank(text[span.start : span.end], "\x00") + text[span.end :]
    return _HIDDEN.sub(lambda match: _blank(match[0], " "), text)


def _blank(text: str, filler: str) -> str:
    return re.sub(r"[^\n]", filler, text)


def _in_tables(text: str) -> Iterator[tuple[int, str]]:
    """Yield bare numbers of columns whose header has a unit; of the whole table where its first column's has."""
    for table in TABLE.finditer(text):
        has_unit = [bool(HEADER_UNIT.search(cell)) for _, cell in _cells(table["header"])]
        start = table.start("rows")
        for row in table["rows"].splitlines(keepends=True):
            for wanted, (offset, cell) in zip(has_unit, _cells(row), strict=False):
                number = re.search(NUMBER, cell)
                if number and (wanted or has_unit[0]):
                    yield start + offset + number.start(), number[0]
            start += len(row)


def _cells(row: str) -> Iterator[tuple[int, str]]:
    """Yield each cell of a table's row with its offset."""
    start = 1
    for cell in row.rstrip().removeprefix("|").removesuffix("|").split("|"):
        yield start, cell
        start += len(cell) + 1
