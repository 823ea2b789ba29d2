"""The Jargon File, one document a dictionary entry."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

from tools.demo.document import Document, Fact
from tools.demo.packages import unpack

PACKAGES = ("jargon-text",)
LICENCE = "public domain"

ENTRIES_A_GROUP = 8
LONGEST_ANSWER = 320


def held_out(group: str) -> bool:
    """Say whether a run of neighbouring entries is kept from training."""
    return int(group) % 10 == 3


def documents(cache: Path) -> Iterator[Document]:
    """Yield the entries in order."""
    path = unpack(PACKAGES[0], cache) / "usr/share/doc/jargon-text/jargon.txt.gz"
    text = gzip.decompress(path.read_bytes()).decode("utf-8")
    lexicon = text.split("\nAppendix A. Hacker Folklore")[0]
    headings = list(re.finditer(r"^   :([^:\n]+(?:::?[^:\n ]+)*):(.*)$", lexicon, re.MULTILINE))
    ends = [heading.start() for heading in headings[1:]] + [len(lexicon)]
    for index, (heading, end) in enumerate(zip(headings, ends, strict=True)):
        term, grammar = heading.group(1).strip(), heading.group(2).strip()
        paragraphs = _paragraphs(lexicon[heading.end() : end])
        if not paragraphs:
            continue
        title = f"{term}: {grammar}".rstrip(": ")
        yield Document(
            "jargon",
            term,
            str(index // ENTRIES_A_GROUP),
            "\n\n".join([title, *paragraphs]) + "\n",
            (Fact("jargon", term, _answer(paragraphs)),),
        )


def _paragraphs(body: str) -> list[str]:
    """Undo the line wrapping, which carries no meaning, and the cross-reference braces."""
    blocks = re.split(r"\n\s*\n", body.replace("{", "").replace("}", ""))
    joined = (" ".join(block.split()) for block in blocks)
    # One-letter blocks and rules of box-drawing characters separate the letters of the alphabet.
    return [block for block in joined if len(block) > 2 and "═" not in block]


def _answer(paragraphs: list[str]) -> str:
    """Return the first sentences of the definition, without etymology, numbering and part of speech."""
    whole = next((text for text in paragraphs if not re.fullmatch(r"\[[^\]]*\]", text)), paragraphs[0])
    for prefix in (r"\d\. ", r"\[[^\]]*\] ", r"(?:n|v|vt|vi|adj|adv|interj|excl)\. ", r"\[[^\]]*\] "):
        whole = re.sub("^" + prefix, "", whole)
    sentences = re.split(r"(?<=[.!?][”)]) |(?<=[.!?]) (?=[A-Z“(])", whole)
    answer = sentences[0]
    for sentence in sentences[1:]:
        if len(answer) + len(sentence) > LONGEST_ANSWER:
            break
        answer += " " + sentence
    return answer
