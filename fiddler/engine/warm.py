"""What a cache has learnt, kept between runs in a file."""

import json
import logging
import os
from contextlib import suppress
from pathlib import Path

from fiddler.cache.cache import ExpertCache
from fiddler.errors import ConfigError
from fiddler.given import read_json

logger = logging.getLogger("fiddler")


def save(cache: ExpertCache, file: Path | None) -> None:
    """Write a cache's scores; a reader finds the old file or the new one, never half of one."""
    if file is not None:
        new = file.with_name(f"{file.name}.{os.getpid()}.new")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(cache.state()))
            new.replace(file)
        except OSError as error:  # the run is over and its tokens are out: nobody is left to raise it to
            logger.warning("warm_start=%r was not written: %s", str(file), error)
            with suppress(OSError):
                new.unlink(missing_ok=True)


def restore(cache: ExpertCache, file: Path | None) -> None:
    """Read a cache's scores; nothing happens if there is no file yet. Raises `ConfigError` for another model's."""
    if file is not None:
        try:
            if file.exists():
                cache.restore(read_json(file))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"warm_start={str(file)!r} cannot be used: {error}; give another file") from error
