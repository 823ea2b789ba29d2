"""Token ids into text as they come: whole characters, without special tokens, cut before a stop string."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"
"""The character shown for bytes that form no character, or not yet."""
_CONTEXT = 8
"""Prompt tokens the decoder sees, so that a first token's leading space is right."""
_CLEANS_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The parts of a tokenizer that a decoder needs."""

    backend: Any
    special: dict[int, str]
    """Tokens that make no text, by id: their own spelling, which a stop string may contain."""
    byte_ids: frozenset[int]
    """Tokens that stand for a byte each. A run of them is text only as a whole: one wrong byte spoils it."""
    cleans: bool
    """Whether spaces before punctuation are taken out of the text, as `clean_up_tokenization` does."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Vocabulary":
        """Read a fast tokenizer."""
        backend = tokenizer.backend_tokenizer
        added = backend.get_added_tokens_decoder()
        special = {i: token.content for i, token in added.items() if token.special}
        bytewise = backend.decoder is not None and b'"ByteFallback"' in _state(backend.decoder)
        pieces = backend.get_vocab(with_added_tokens=False).items() if bytewise else ()
        is_bpe = type(backend.model).__name__ == "BPE"
        forced = getattr(tokenizer, _CLEANS_BPE, False)
        return cls(
            backend=backend,
            special=special,
            byte_ids=frozenset(i for piece, i in pieces if _BYTE.fullmatch(piece)),
            cleans=bool(tokenizer.clean_up_tokenization_spaces) and (not is_bpe or bool(forced)),
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens, spaces before punctuation still in it."""
        return str(self.backend.decode(ids, skip_special_tokens=True))


class Decoder:
    """Turns one request's tokens into text as they come: together, the pieces equal the text decoded at once.

    No piece ends inside a character while its rest may come. Stop strings are searched in the text with the special
    tokens in it, as transformers searches them; special tokens themselves are never part of a piece.
    """

    def __init__(self, vocabulary: Vocabulary | None, prompt_ids: Sequence[int], stops: Sequence[str]) -> None:
        self._vocabulary = vocabulary
        self._stops = tuple(stops)
        self._window: list[int] = []
        self._n_out = 0  # tokens of the window whose text has left it
        self._out = ""  # that text
        self._open = ""  # text behind it that the next token may change
        self._between: list[tuple[int, str]] = []  # special tokens there, and behind how many of its characters
        self._spaces = _Spaces(cleans=vocabulary is not None and vocabulary.cleans)
        self._held = _Held()
        if vocabulary is not None:
            self._window, self._n_out = _context(vocabulary, prompt_ids)
            self._out = vocabulary.decode(self._window[: self._n_out])

    def push(self, token_id: int) -> tuple[str, bool]:
        """Return the text that became final with this token, and whether a stop string was completed."""
        if self._vocabulary is None:
            return "", False
        if token_id in self._vocabulary.special:
            self._between.append((len(self._open), self._vocabulary.special[token_id]))
            if not self._open:
                self._settle()
        else:
            self._advance(self._vocabulary, token_id)
        if not self._stops:
            return self._held.take(len(self._held.text)), False
        ahead = "".join(text for text, _ in self._pieces())
        read = self._held.text + self._spaces.ahead(ahead.rstrip(_HALF))
        found = [at for stop in self._stops if (at := read.find(stop)) >= 0]
        if found:
            self._settle()
            self._held.add(self._spaces.flush())
            text = self._held.take(min(found))
            self._held = _Held()
            return text, True
        return self._held.take(len(read) - _overlap(read, self._stops)), False

    def flush(self) -> str:
        """Return the text held back: for a stop string that did not come, or inside a character."""
        self._out += self._open
        self._settle()
        self._held.add(self._spaces.flush())
        return self._held.take(len(self._held.text))

    def _pieces(self) -> list[tuple[str, bool]]:
        """Return the open text and the special tokens in it, in their order, and whether each is shown."""
        pieces, start = [], 0
        for at, special in self._between:
            pieces += [(self._open[start:at], True), (special, False)]
            start = at
        return [*pieces, (self._open[start:], True)]

    def _settle(self) -> None:
        """Make the open text final."""
        for text, shown in self._pieces():
            self._held.add(self._spaces.push(text) if shown else text, shown=shown)
        self._open, self._between = "", []

    def _advance(self, vocabulary: Vocabulary, token_id: int) -> None:
        """Read one more token into the window; final text leaves it, and the window then starts behind it."""
        if vocabulary.backend.id_to_token(token_id) is None:  # a row of the model's that no token has
            return
        self._window.append(token_id)
        text = vocabulary.decode(self._window)
        self._open = text[_n_common(text, self._out) :]
        if not self._open or self._open.endswith(_HALF) or token_id in vocabulary.byte_ids:
            return
        self._settle()
        self._window = self._window[self._n_out :]
        self._n_out = len(self._window)
        self._out = vocabulary.decode(self._window)


class _Held:
    """Text that waits to be handed out, and special tokens in between, which are searched but not handed out."""

    def __init__(self) -> None:
        self.text = ""
        self._parts: list[tuple[str, bool]] = []

    def add(self, text: str, *, shown: bool = True) -> None:
        if text:
            self.text += text
            self._parts.append((text, shown))

    def take(self, n: int) -> str:
        """Remove the first `n` characters; returns those that are shown."""
        taken, left = "", []
        self.text = self.text[max(n, 0) :]
        for text, shown in self._parts:
            now, later = text[: max(n, 0)], text[max(n, 0) :]
            n -= len(now)
            taken += now if shown else ""
            if later:
                left.append((later, shown))
        self._parts = left
        return taken


class _Spaces:
    """Removes spaces before punctuation from text that comes in pieces, if the tokenizer says so."""

    _PATTERNS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
    _MAY_GO_ON = frozenset(" 'n.?!,")
    """Characters before a space that may belong to a pattern which contains this space."""

    def __init__(self, *, cleans: bool) -> None:
        self._cleans = cleans
        self._rest = ""

    def push(self, text: str) -> str:
        """Return the text that is final: all before the last space that no pattern removes."""
        if not self._cleans:
            return text
        self._rest += text
        cut = self._rest.rfind(" ")
        while cut > 0 and self._rest[cut - 1] in self._MAY_GO_ON:
            cut = self._rest.rfind(" ", 0, cut)
        cut = max(cut, 0)
        done, self._rest = self._rest[:cut], self._rest[cut:]
        return self._clean(done)

    def ahead(self, text: str) -> str:
        """Return the text held here followed by `text`, as it would come out at the end."""
        return self._clean(self._rest + text) if self._cleans else text

    def flush(self) -> str:
        """Return the text held here."""
        rest, self._rest = self._rest, ""
        return self._clean(rest)

    def _clean(self, text: str) -> str:
        for pattern in self._PATTERNS:
            text = text.replace(pattern, pattern.strip(" "))
        return text


def _state(decoder: Any) -> bytes:
    """Return a decoder's description, JSON; empty where it has none (one written in Python)."""
    try:
        state = decoder.__getstate__()
    except Exception:  # whatever a foreign decoder says
        return b""
    return state if isinstance(state, bytes) else json.dumps(state, default=str).encode()


def _context(vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> tuple[list[int], int]:
    """Return the prompt's last tokens, from no run of bytes' inside, and how many of them are whole characters."""
    start = max(0, len(prompt_ids) - _CONTEXT)
    while start and prompt_ids[start] in vocabulary.byte_ids:
        start -= 1
    ids = list(prompt_ids[start:])
    for n_whole in range(len(ids), max(-1, len(ids) - 4), -1):  # a character has at most four bytes
        if not vocabulary.decode(ids[:n_whole]).endswith(_HALF):
            return ids, n_whole
    return ids, len(ids)


def _n_common(text: str, before: str) -> int:
    """Return how many characters two texts begin with alike: all of `before`, unless a token changed it."""
    if text.startswith(before):
        return len(before)
    return next((i for i, (a, b) in enumerate(zip(text, before, strict=False)) if a != b), len(text))


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of `text` with which a stop string could begin."""
    longest = min(len(text), max((len(s) for s in stops), default=1) - 1)
    for n in range(longest, 0, -1):
        if any(stop.startswith(text[-n:]) for stop in stops):
            return n
    return 0
