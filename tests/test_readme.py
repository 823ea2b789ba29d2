"""README keeps its word: its programs run as they stand, and its first lines say what is refused."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_every_program_runs_as_it_stands(number: int, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAMS[number], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_programs() -> None:
    assert len(PROGRAMS) >= 2


def test_the_limits_stand_where_the_promise_does() -> None:
    first = README.split("\n\n")[1]
    assert "safetensors" in first
    assert "Of GGUF it runs five architectures" in first
    assert "refused" in first
