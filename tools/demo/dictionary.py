"""WordNet glosses that come with an example sentence, a run of neighbouring entries to a document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tools.demo.document import Document, Fact
from tools.demo.packages import unpack

PACKAGES = ("wordnet-base",)
LICENCE = "WordNet 3.0 licence (use, copy, modify and distribute freely, keeping its notice)"

PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
ENTRIES_A_DOCUMENT = 16


def held_out(group: str) -> bool:
    """Say whether a document is kept from training."""
    return int(group.split()[1]) % 26 == 7


def documents(cache: Path) -> Iterator[Document]:
    """Yield the entries in the order of the files, which keeps related words together."""
    folder = unpack(PACKAGES[0], cache) / "usr/share/wordnet"
    for suffix, part in PARTS.items():
        entries = list(_entries(folder, suffix, part))
        for start in range(0, len(entries), ENTRIES_A_DOCUMENT):
            run = entries[start : start + ENTRIES_A_DOCUMENT]
            name = f"{part} {start // ENTRIES_A_DOCUMENT}"
            text = "\n".join(line for line, _ in run) + "\n"
            yield Document("dictionary", name, name, text, tuple(fact for _, fact in run if fact))


def _entries(folder: Path, suffix: str, part: str) -> Iterator[tuple[str, Fact | None]]:
    first_sense = _first_senses(folder / f"index.{suffix}")
    for line in (folder / f"data.{suffix}").read_text(encoding="utf-8").splitlines():
        if line.startswith(" ") or '; "' not in line:
            continue
        fields, gloss = line.split(" | ", 1)
        offset, _, _, count, *rest = fields.split()
        # Words and their sense numbers alternate; an adjective may carry a marker such as "(a)".
        words = [word.split("(")[0] for word in rest[: 2 * int(count, 16) : 2]]
        gloss = gloss.strip()
        names = ", ".join(word.replace("_", " ") for word in words)
        plain = [word for word in words if word.isalpha() and first_sense.get(word.lower()) == offset]
        fact = Fact("word", plain[0], f"As {_article(part)}, {plain[0]} means {gloss}.") if plain else None
        yield f"{names} ({part}): {gloss}", fact


def _first_senses(index: Path) -> dict[str, str]:
    """Map each word to the file offset of its most frequent sense, which the index lists first."""
    senses = {}
    for line in index.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            word, _, sense_count, *rest = line.split()
            senses[word] = rest[-int(sense_count)]
    return senses


def _article(part: str) -> str:
    return f"{'an' if part[0] == 'a' else 'a'} {part}"
