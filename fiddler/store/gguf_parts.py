"""Which files are a GGUF model: one, or the parts that `llama-gguf-split` makes, `NAME-00001-of-00003.gguf`."""

import re
from pathlib import Path

from fiddler.errors import CheckpointError
from fiddler.given import open_regular

SUFFIX = ".gguf"
MAGIC = b"GGUF"
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_MOST = 10_000
"""Parts of a model: more is damage."""


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that is named as GGUF."""
    return path.name.lower().endswith(SUFFIX) and path.is_file()


def refuse_other(file: Path) -> None:
    """Raise `CheckpointError` for a file of another kind."""
    try:
        begins = _begins(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be opened: {error}") from error
    if not begins:
        raise CheckpointError(f"{file} does not begin with GGUF: it is another file, or empty; download it again")


def begins_as_gguf(file: Path) -> bool:
    """Whether a file of any name holds GGUF, as those that Ollama and the hub's cache name by their digests."""
    try:
        return _begins(file)
    except (OSError, ValueError):
        return False


def _begins(file: Path) -> bool:
    with open_regular(file) as stream:
        return stream.read(len(MAGIC)) == MAGIC


def all_parts(file: Path) -> list[Path]:
    """Return all parts of a model by one of them. Raises `CheckpointError` where one is missing."""
    match = _PART.fullmatch(file.name)
    if match is None:
        return [file]
    count = int(match["count"])
    if not 0 < int(match["number"]) <= count < _MOST:
        raise CheckpointError(f"{file} is named as a part that no model has; give it its name back")
    suffix = file.name[-len(SUFFIX) :]
    files = [file.with_name(f"{match['stem']}-{n:05}-of-{match['count']}{suffix}") for n in range(1, count + 1)]
    if missing := [part.name for part in files if not part.is_file()]:
        raise CheckpointError(
            f"{file.parent} lacks {len(missing)} of {count} files, first {missing[0]}; download them"
        )
    return files


def firsts(names: list[str]) -> list[str]:
    """Return the names of a folder's GGUF models, of split ones the first part's."""
    models = [name for name in names if name.lower().endswith(SUFFIX)]
    return [name for name in models if (match := _PART.fullmatch(name)) is None or int(match["number"]) == 1]
