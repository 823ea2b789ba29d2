"""Gather the documents of all domains and split them into a training and a held-out part."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tools.demo import chat, dictionary, jargon, manual, python_source, scripture
from tools.demo.document import Document

SOURCES: dict[str, ModuleType] = {
    "scripture": scripture,
    "jargon": jargon,
    "dictionary": dictionary,
    "python": python_source,
    "manual": manual,
}
DOMAINS = (*SOURCES, "chat")
SEED = 20240

SHINGLE_WORDS = 8
# A page that mostly repeats earlier ones teaches nothing, and a held-out page that repeats training text
# measures memory rather than prediction.
MOST_REPEATED_IN_TRAINING = 0.5
MOST_REPEATED_IN_HELD_OUT = 0.2


@dataclass(frozen=True)
class Corpus:
    """The documents to train on and the ones to measure on."""

    training: list[Document]
    held_out: list[Document]
    # Share of the eight-word runs of the held-out text, by domain, that also occur in the training text.
    overlap: dict[str, float]


def load(cache: Path) -> Corpus:
    """Fetch, clean, split and de-duplicate the text of all domains."""
    training: list[Document] = []
    candidates: list[Document] = []
    for source in SOURCES.values():
        for document in source.documents(cache):
            (candidates if source.held_out(document.group) else training).append(document)
    training, seen = _without_repeats(training)
    held_out = [document for document in candidates if _repeated(document, seen) <= MOST_REPEATED_IN_HELD_OUT]
    overlap = {domain: _mean_overlap(domain, held_out, seen) for domain in SOURCES}
    rng = random.Random(SEED)
    # Held-out questions come from held-out documents only, so their answers were never read.
    training += chat.documents(training, rng, chat.TRAINING_EXCHANGES)
    held_out += chat.documents(held_out, rng, chat.HELD_OUT_EXCHANGES)
    return Corpus(training, held_out, overlap)


def text_of(documents: Iterable[Document], domain: str) -> str:
    """Return the text of one domain, in order."""
    return "\n".join(document.text for document in documents if document.domain == domain)


def _shingles(text: str) -> set[int]:
    words = text.split()
    runs = (" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1))
    return {zlib.crc32(run.encode()) for run in runs}


def _repeated(document: Document, seen: set[int]) -> float:
    shingles = _shingles(document.text)
    return len(shingles & seen) / max(1, len(shingles))


def _without_repeats(documents: list[Document]) -> tuple[list[Document], set[int]]:
    seen: set[int] = set()
    kept = []
    for document in documents:
        shingles = _shingles(document.text)
        if len(shingles & seen) <= MOST_REPEATED_IN_TRAINING * len(shingles):
            kept.append(document)
            seen |= shingles
    return kept, seen


def _mean_overlap(domain: str, documents: list[Document], seen: set[int]) -> float:
    shingles: set[int] = set()
    for document in documents:
        if document.domain == domain:
            shingles |= _shingles(document.text)
    return len(shingles & seen) / max(1, len(shingles))
