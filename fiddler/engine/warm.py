"""What a cache has learnt, kept between runs in a file."""

import json
import os
from pathlib import Path

from fiddler.cache.cache import ExpertCache
from fiddler.errors import ConfigError


def save(cache: ExpertCache, file: Path | None) -> None:
    """Write a cache's scores; a reader finds the old file or the new one, never half of one."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}.{os.getpid()}.new")
        new.write_text(json.dumps(cache.state()))
        new.replace(file)


def restore(cache: ExpertCache, file: Path | None) -> None:
    """Read a cache's scores; nothing happens if there is no file yet. Raises `ConfigError` for another model's."""
    if file is not None and file.exists():
        try:
            cache.restore(json.loads(file.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"warm_start={str(file)!r} cannot be used: {error}; give another file") from error
