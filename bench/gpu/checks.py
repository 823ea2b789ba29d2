"""Whether what runs on this GPU is right: the tests that need one."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import bench
from bench.gpu.context import Context

ROOT = Path(bench.__file__).parents[1]
COUNTED = re.compile(r"(\d+) (passed|failed|skipped|error)")
"""In pytest's last line."""
LINES = 12
"""Of the end of what pytest says, where something failed."""


def checks(ctx: Context) -> dict[str, Any]:
    """Run the tests in a process of its own, on the same GPU; returns how many there were and how they ended."""
    return {"tests": _tests(ctx)}


def _tests(ctx: Context) -> dict[str, Any]:
    paths = [path for path in ctx.sizes.tests if (ROOT / path).exists()]
    if not paths:
        return {"paths": paths, "exit_code": None, "says": "there are no such tests here"}
    command = [sys.executable, "-m", "pytest", *paths]
    try:
        gpu = {**os.environ, "FIDDLER_GPU": "1"}  # which tests hide from themselves otherwise
        done = subprocess.run(command, cwd=ROOT, env=gpu, capture_output=True, text=True, timeout=ctx.sizes.tests_s)
    except subprocess.TimeoutExpired:
        return {"paths": paths, "exit_code": None, "says": f"not done after {ctx.sizes.tests_s:.0f} s"}
    lines = done.stdout.splitlines()
    n = Counter({word: int(many) for many, word in COUNTED.findall(lines[-1] if lines else "")})
    counts = {"tests": n.total(), "failures": n["failed"], "errors": n["error"], "skipped": n["skipped"]}
    says = "\n".join((lines + done.stderr.splitlines())[-LINES:]) if done.returncode else ""
    return {"paths": paths, "exit_code": done.returncode, **counts, "says": says}
