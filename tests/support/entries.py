"""What a call enters of our own functions: the price of Python, counted and not timed."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import fiddler

HERE = str(Path(fiddler.__file__).parent)


def entries(call: Callable[[], object]) -> list[str]:
    """Return the names of our functions that a call enters in this thread, in order, once for each time."""
    found: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(HERE):
            found.append(frame.f_code.co_qualname)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found
