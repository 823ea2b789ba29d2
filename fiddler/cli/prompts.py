"""Reads the prompts of a command that runs several, each with a name."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fiddler.cli.flags import giving
from fiddler.errors import ConfigError, PromptError

Named = tuple[str, Any]
"""A name, and the prompt: text, token ids or chat messages."""

DEMO_PROMPTS: tuple[Named, ...] = (
    ("scripture", "And it came to pass"),
    ("jargon", "hacker: n. "),
    ("dictionary", "brisk: "),
    ("python", "def copytree(src, dst"),
    ("manual", "The CREATE TABLE statement"),
    ("chat", [{"role": "user", "content": "What is a kluge?"}]),
)
"""One for each kind of text the built-in demo model was trained on."""


def read_prompts(given: Sequence[str], file: Path | None, *, demo: bool) -> list[Named]:
    """Return the prompts that were given, then the file's; the demonstration's where there are none.

    One without a name has its number, from 0. Raises `ConfigError` for a file that cannot be used or if there is no
    prompt, and `PromptError` for undecodable text.
    """
    prompts: list[tuple[str | None, Any]] = [(None, prompt) for prompt in given]
    if file is not None:
        with giving("--prompts"):
            prompts += _read(file)
    if not prompts and demo and file is None:
        return list(DEMO_PROMPTS)
    if not prompts:
        raise ConfigError("there is no prompt; give --prompt TEXT, or --prompts FILE with one a line")
    named = [(str(i) if name is None else name, prompt) for i, (name, prompt) in enumerate(prompts)]
    for name, prompt in named:
        _check(name, prompt)
    return named


def _read(file: Path) -> Iterator[tuple[str | None, Any]]:
    if file.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"{file} must be a .txt file, one prompt a line, or a .jsonl file, one object a line")
    try:
        text = file.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a mark of its encoding
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a prompt may have other separators
        if line.strip():
            prompt = line.removesuffix("\r")
            yield _parse(line, f"{file}, line {number}") if file.suffix == ".jsonl" else (None, prompt)


def _parse(line: str, where: str) -> tuple[str | None, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str | list):
        raise ConfigError(f"{where} must be an object with a 'prompt': text, token ids or chat messages")
    name = value.get("name")
    if not isinstance(name, str | None):
        raise ConfigError(f"{where}: 'name' must be a text")
    return name, value["prompt"]


def _check(name: str, prompt: Any) -> None:
    try:
        f"{name}{prompt if isinstance(prompt, str) else ''}".encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"prompt {name!r} is not valid UTF-8: {error.reason}") from error
