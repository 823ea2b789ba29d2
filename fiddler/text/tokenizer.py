"""A checkpoint's tokenizer: prompts into token ids, and the way back."""

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fiddler.errors import CheckpointError, PromptError
from fiddler.given import MOST_BYTES, read_json
from fiddler.store.folder import refuse_pointer
from fiddler.store.gguf_parts import is_gguf
from fiddler.text.decoder import Decoder, Vocabulary
from fiddler.text.prompts import Prompt, plain
from fiddler.text.reading import Asking, Question, Reader, TooMany

_SURE = ("tokenizer.json", "tokenizer_config.json")
_MAYBE = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
"""Tokenizer files from which transformers builds a fast tokenizer, for some model types."""


_READ = (
    *_SURE,
    *_MAYBE,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that transformers reads whole, whatever their size."""


class Text:
    """A checkpoint's tokenizer; `None` where it has none, and then only token ids are understood.

    Templates are rendered and texts tokenised in a process beside the program (`text.reading`), which starts with
    the first of them and ends with `close`. `tokenizer` is the caller's own copy: its settings change nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._own = tokenizer
        self._reader = Reader(self._definition)
        self._copy: PreTrainedTokenizerBase | None = None
        self._lock = Lock()

    @classmethod
    def open(cls, folder: Path, *, trust_remote_code: bool = False) -> "Text":
        """Load the tokenizer of a folder, if it has a fast one, or of a GGUF file. Raises `CheckpointError`."""
        if is_gguf(folder):
            from fiddler.text.gguf import gguf_tokenizer

            return cls(gguf_tokenizer(folder))
        _refuse_unreadable(folder)
        sure = any((folder / name).is_file() for name in _SURE)
        if not sure and not any((folder / name).is_file() for name in _MAYBE):
            return cls(None)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
            if not tokenizer.chat_template:
                tokenizer.chat_template = _legacy_template(folder)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # its files or code raise what they like, and a panic is no `Exception`
            if not sure:
                return cls(None)
            for name in _READ:
                refuse_pointer(folder / name)
            raise CheckpointError(
                f"the tokenizer of {folder} cannot be read: {error}; check its files, or download them"
            ) from error
        return cls(tokenizer if tokenizer.is_fast else None)

    @property
    def known(self) -> bool:
        """Whether there is a tokenizer."""
        return self._own is not None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """A copy of the tokenizer that is the caller's own, made when it is first asked for."""
        with self._lock:
            if self._copy is None:
                self._copy = copy.deepcopy(self._own)
            return self._copy

    def start(self) -> None:
        """Get ready to read and to decode, if there is a tokenizer. Raises `EngineFailedError`."""
        if self._vocabulary is not None and self._description is not None:
            self._reader.start()

    def close(self) -> None:
        """End the process that reads, if one runs."""
        self._reader.close()

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids, however many. Raises `PromptError` where it is empty or of another kind."""
        found = self.read(prompt, None)
        assert not isinstance(found, TooMany)
        return found

    def read(self, prompt: Prompt, n_most: int | None, asking: Asking | None = None) -> list[int] | TooMany:
        """Return a prompt's token ids, unless they are surely more than `n_most`; a few more may be returned.

        Time and memory are bounded by `n_most`. Raises `PromptError`, and `EngineFailedError` or
        `EngineClosedError` where there is no process to read with.
        """
        if isinstance(prompt, str):
            found = self._ask(Question(str.__str__(prompt), True, n_most), asking)
        elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
            raise PromptError(f"prompt must be text, token ids or chat messages, not {type(prompt).__name__}")
        elif not is_ids(prompt):
            found = self._chat(prompt, n_most, asking)
        elif n_most is not None and len(prompt) > n_most:
            return TooMany(len(prompt), counted=True)
        else:
            if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in prompt):
                raise PromptError("prompt must be text, token ids (whole numbers from 0) or chat messages")
            found = list(cast("Sequence[int]", prompt))
        if not found:
            raise PromptError("the prompt is empty; give at least one token")
        return found

    def decoder(self, prompt_ids: Sequence[int], stop_strings: Sequence[str]) -> Decoder:
        """Return a decoder for a prompt's completion. Raises `PromptError` for stop strings without a tokenizer."""
        if self._vocabulary is None and stop_strings:
            raise PromptError("stop_strings need a tokenizer, which this checkpoint lacks")
        return Decoder(self._vocabulary, prompt_ids, stop_strings)

    @property
    def _template(self) -> str | None:
        """The chat template: the one named default, where there are several. Raises `PromptError` where none is."""
        if self._own is None or not self._own.chat_template:
            return None
        try:
            return str(self._own.get_chat_template())
        except ValueError as error:
            raise PromptError(f"this checkpoint has no default chat template: {error}") from error

    @cached_property
    def _vocabulary(self) -> Vocabulary | None:
        return None if self._own is None else Vocabulary.of(self._own)

    def _chat(self, messages: Sequence[Any], n_most: int | None, asking: Asking | None) -> list[int] | TooMany:
        if self._template is None:
            raise PromptError("this checkpoint has no chat template; give the prompt as text")
        return self._ask(Question(plain(messages), False, n_most), asking)

    def _ask(self, question: Question, asking: Asking | None) -> list[int] | TooMany:
        if self._own is None:
            raise PromptError(
                "this checkpoint has no fast tokenizer (tokenizer.json); give the prompt as token ids"
            )
        if self._description is not None:
            return self._reader.ask(question, asking)
        with self._lock:  # a tokenizer keeps settings that calls change
            return _ask_here(self._own, question)

    @cached_property
    def _description(self) -> str | None:
        """The tokenizer in JSON; `None` if it uses Python code of its own instead of the tokenizers library."""
        kind = type(self._own)
        for name in ("__call__", "_encode_plus", "apply_chat_template"):
            if getattr(kind, name) is not getattr(PreTrainedTokenizerFast, name):
                return None
        try:
            return str(cast("Any", self._own).backend_tokenizer.to_str())
        except Exception:  # parts written in Python
            return None

    def _definition(self) -> dict[str, Any]:
        """Return plain values that describe the tokenizer and its template to the reading process."""
        own = cast("Any", self._own)
        try:
            template = self._template
        except PromptError:  # for texts there need be none
            template = None
        return {
            "tokenizer": self._description,
            "split_special_tokens": bool(own.split_special_tokens),
            "template": template,
            "special_tokens": dict(own.special_tokens_map),
        }


def is_ids(prompt: Prompt) -> bool:
    """Return whether a prompt is meant as token ids: neither text nor messages."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes | bytearray):
        return False
    return not (len(prompt) and isinstance(prompt[0], Mapping))


def _ask_here(tokenizer: Any, question: Question) -> list[int]:
    """Read a prompt with a tokenizer's own code, which its owner chose to trust."""
    what = "the chat template refused the messages"
    try:
        text = question.said
        if not isinstance(text, str):
            text = tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=False)
        what = "the tokenizer refused the text"
        return list(tokenizer(text, add_special_tokens=question.special)["input_ids"])
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise PromptError(f"{what}: {error}") from error


def _legacy_template(folder: Path) -> str | None:
    """Return the template that transformers' processors read from a file of its own, which tokenizers ignore."""
    file = folder / "chat_template.json"
    if not file.is_file():
        return None
    return str(read_json(file)["chat_template"])


def _refuse_unreadable(folder: Path) -> None:
    for file in (*(folder / name for name in _READ), *folder.glob("additional_chat_templates/*.jinja")):
        try:
            n_bytes = file.stat().st_size if file.is_file() else 0
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        if n_bytes > MOST_BYTES:
            raise CheckpointError(f"{file} has {n_bytes} bytes, and no tokenizer takes so many; download it again")
