"""JSON files that others have written: read whole, whatever lies there."""

import json
import os
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

MOST_BYTES = 1 << 28
"""The index of a checkpoint of a million tensors takes half of it."""


def read_json(file: Path) -> Any:
    """Return the value in a file.

    Raises `OSError` where it cannot be read, and `ValueError` where it is a pipe or a device, larger than
    `MOST_BYTES`, not UTF-8, not JSON, or nested deeper than Python reads.
    """
    with open_regular(file) as stream:
        n_bytes = os.fstat(stream.fileno()).st_size
        if n_bytes > MOST_BYTES:
            raise ValueError(f"{file.name} has {n_bytes} bytes")
        text = stream.read().decode("utf-8")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{file.name} is nested too deeply") from None


def open_regular(file: Path) -> BinaryIO:
    """Open a file for its bytes; a pipe that has just taken its name is not waited for.

    Raises `OSError` where it cannot be opened, and `ValueError` where it is a pipe or a device.
    """
    stream = open(file, "rb", opener=lambda path, flags: os.open(path, flags | _AT_ONCE))  # noqa: SIM115
    if not S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise ValueError(f"{file.name} is not a regular file")
    return stream


_AT_ONCE = getattr(os, "O_NONBLOCK", 0)
