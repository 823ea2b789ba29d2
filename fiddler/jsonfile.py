"""JSON files that others have written: read whole, whatever lies there."""

import json
from pathlib import Path
from stat import S_ISREG
from typing import Any

MOST_BYTES = 1 << 28
"""The index of a checkpoint of a million tensors takes half of it."""


def read_json(file: Path) -> Any:
    """Return the value in a file.

    Raises `OSError` where it cannot be read, and `ValueError` where it is a pipe or a device, larger than
    `MOST_BYTES`, not UTF-8, not JSON, or nested deeper than Python reads.
    """
    about = file.stat()
    if not S_ISREG(about.st_mode):
        raise ValueError(f"{file.name} is not a regular file")
    if about.st_size > MOST_BYTES:
        raise ValueError(f"{file.name} has {about.st_size} bytes")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{file.name} is nested too deeply") from None
