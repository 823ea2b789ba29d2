"""The SQLite manual, one document a page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from zlib import crc32

from tools.demo.document import Document
from tools.demo.packages import unpack

PACKAGES = ("sqlite3-doc",)
LICENCE = "public domain"

# Indexes, and pages that repeat others whole (``c3ref`` and ``session`` hold the same text a page each).
SKIPPED = re.compile(
    r"doc_|keyword_index|capi3ref|requirements|fullsql|syntaxdiagrams|syntax|sitemap|fileformat2|releaselog/"
    r"|session\.html|search|news|oldnews|chronology|toc|docs\.html|c3ref/(intro|funclist|constlist|objlist)"
)
DROPPED_TAGS = frozenset({"script", "style", "svg", "head", "button", "select"})
DROPPED_CLASSES = frozenset({"nosearch", "fancy_toc", "imgcontainer", "startsearch", "endsearch"})
VOID_TAGS = frozenset({"br", "img", "hr", "input", "link", "meta", "area", "col", "wbr"})
BLOCK_TAGS = frozenset({"p", "h1", "h2", "h3", "h4", "div", "table", "ul", "ol", "dl", "blockquote", "pre"})
LINE_TAGS = frozenset({"br", "li", "tr", "dt", "dd"})


def held_out(group: str) -> bool:
    """Say whether a page is kept from training."""
    return crc32(group.encode()) % 15 == 6


def documents(cache: Path) -> Iterator[Document]:
    """Yield the text of the pages."""
    root = unpack(PACKAGES[0], cache) / "usr/share/doc/sqlite3"
    for path in sorted(root.rglob("*.html")):
        name = path.relative_to(root).as_posix()
        if SKIPPED.match(name):
            continue
        page = _PageText()
        page.feed(path.read_text(encoding="utf-8", errors="replace"))
        text = page.text()
        if len(text) > 400:
            yield Document("manual", name, name, text)


class _PageText(HTMLParser):
    """Collects the prose and the code of a page, and leaves its navigation and diagrams out."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        # The tag that opened a dropped part, and how many of the same name are open inside it.
        self._dropped: tuple[str, int] | None = None
        self._verbatim = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._dropped:
            if tag == self._dropped[0]:
                self._dropped = (tag, self._dropped[1] + 1)
            return
        classes = set((dict(attrs).get("class") or "").split())
        if tag not in VOID_TAGS and (tag in DROPPED_TAGS or classes & DROPPED_CLASSES):
            self._dropped = (tag, 1)
            return
        self._break(tag)
        self._verbatim |= tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._dropped:
            if tag == self._dropped[0]:
                depth = self._dropped[1] - 1
                self._dropped = (tag, depth) if depth else None
            return
        self._verbatim &= tag != "pre"
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if not self._dropped:
            self._parts.append(data if self._verbatim else re.sub(r"\s+", " ", data))

    def text(self) -> str:
        """Return the text of what was fed."""
        joined = "".join(self._parts).replace("\xa0", " ")
        joined = re.sub(r"[ \t]+\n", "\n", joined)
        joined = re.sub(r"\n (?=\S)", "\n", joined)
        return re.sub(r"\n{3,}", "\n\n", joined).strip() + "\n"

    def _break(self, tag: str) -> None:
        if tag in BLOCK_TAGS:
            self._parts.append("\n\n")
        elif tag in LINE_TAGS:
            self._parts.append("\n")
