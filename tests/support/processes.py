"""Processes that a test started, or that they started."""

import time
from pathlib import Path

import pytest


def wait_until_gone(pid: int) -> None:
    """A process that was killed is gone once somebody has taken note of it."""
    for _ in range(300):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} was left running")
