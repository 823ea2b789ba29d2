"""Text to token ids and back, one token at a time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fiddler.errors import CheckpointError, PromptError
from fiddler.models.prompts import Prompt


class Text:
    """A checkpoint's tokenizer; `None` inside where it has none, and then only token ids are understood."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def open(cls, folder: Path, *, trust_remote_code: bool = False) -> "Text":
        """Load the tokenizer of a checkpoint folder, if it has a fast one. Raises `CheckpointError`."""
        if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
            return cls(None)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # whatever a tokenizer's files or its code make it raise
            raise CheckpointError(f"the tokenizer of {folder} cannot be read: {error}") from error
        return cls(tokenizer if tokenizer.is_fast else None)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids. Raises `PromptError` where it is empty or of another kind."""
        if isinstance(prompt, str):
            ids = self._encode_text(prompt, special=True)
        elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
            raise PromptError(f"prompt must be text, token ids or chat messages, not {type(prompt).__name__}")
        elif prompt and isinstance(prompt[0], Mapping):
            ids = self._encode_text(self._chat(prompt), special=False)
        else:
            if not all(isinstance(i, int) and i >= 0 for i in prompt):
                raise PromptError("prompt must be text, token ids (whole numbers from 0) or chat messages")
            ids = list(cast("Sequence[int]", prompt))
        if not ids:
            raise PromptError("the prompt is empty; give at least one token")
        return ids

    def _encode_text(self, text: str, *, special: bool) -> list[int]:
        if self.tokenizer is None:
            raise PromptError(
                "this checkpoint has no fast tokenizer (tokenizer.json); give the prompt as token ids"
            )
        try:
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        except (TypeError, ValueError) as error:  # half a surrogate pair, which JSON can carry
            raise PromptError(f"the tokenizer refused the text: {error}") from error

    def _chat(self, messages: Any) -> str:
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise PromptError("this checkpoint has no chat template; give the prompt as text")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs of the checkpoint and raise what they like
            raise PromptError(f"the chat template refused the messages: {error}") from error
        return str(text)

    def decoder(self, prompt_ids: Sequence[int], stop_strings: Sequence[str]) -> "Decoder":
        """Return a decoder for what follows a prompt. Raises `PromptError` for stop strings without a tokenizer."""
        if self.tokenizer is None:
            if stop_strings:
                raise PromptError("stop_strings need a tokenizer, which this checkpoint lacks")
            return Decoder(None, (), ())
        return Decoder(self.tokenizer.backend_tokenizer, prompt_ids, stop_strings)


class Decoder:
    """Turns one request's token ids into text as they come; never half a character, never past a stop string."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop_strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=_context(tokenizer, prompt_ids), skip_special_tokens=True)
        self._stops = tuple(stop_strings)
        self._held = ""

    def push(self, token_id: int) -> tuple[str, bool]:
        """Return the text that became final with this token, and whether a stop string was completed."""
        if self._tokenizer is None:
            return "", False
        self._held += self._stream.step(self._tokenizer, token_id) or ""
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            return text, True
        n_kept = _overlap(self._held, self._stops)
        text, self._held = self._held[: len(self._held) - n_kept], self._held[len(self._held) - n_kept :]
        return text, False

    def flush(self) -> str:
        """Return text held back for a stop string that did not come."""
        text, self._held = self._held, ""
        return text


_CONTEXT = 8
"""Prompt tokens the decoder sees, so that a first token's leading space is right."""


def _context(tokenizer: Any, prompt_ids: Sequence[int]) -> list[int]:
    """Return the prompt's last tokens; of a prompt that ends inside a character only that character's."""
    ids = list(prompt_ids[-_CONTEXT:])
    stop = len(ids)
    while stop and tokenizer.decode(ids[:stop]).endswith("\ufffd"):
        stop -= 1
    return ids if stop == len(ids) else ids[stop:]


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of `text` with which a stop string could begin."""
    longest = min(len(text), max((len(s) for s in stops), default=1) - 1)
    for n in range(longest, 0, -1):
        if any(stop.startswith(text[-n:]) for stop in stops):
            return n
    return 0
