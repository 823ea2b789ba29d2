"""Whether what runs on this GPU is right: the tests that need one."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bench
from bench.gpu.context import Context

ROOT = Path(bench.__file__).parents[1]
COUNTS = ("tests", "failures", "errors", "skipped")
LINES = 12
"""Of the end of what pytest says, where something failed."""


def checks(ctx: Context) -> dict[str, Any]:
    """Run the tests in a process of its own, on the same GPU; returns how many there were and how they ended."""
    return {"tests": _tests(ctx)}


def _tests(ctx: Context) -> dict[str, Any]:
    paths = [path for path in ctx.sizes.tests if (ROOT / path).exists()]
    if not paths:
        return {"paths": paths, "exit_code": None, "says": "there are no such tests here"}
    report = ctx.scratch / "tests.xml"
    command = [sys.executable, "-m", "pytest", *paths, f"--junitxml={report}"]
    try:
        gpu = {**os.environ, "FIDDLER_GPU": "1"}  # which tests hide from themselves otherwise
        done = subprocess.run(command, cwd=ROOT, env=gpu, capture_output=True, text=True, timeout=ctx.sizes.tests_s)
    except subprocess.TimeoutExpired:
        return {"paths": paths, "exit_code": None, "says": f"not done after {ctx.sizes.tests_s:.0f} s"}
    counts: Counter[str] = Counter()
    if report.is_file():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            counts.update({name: int(suite.get(name, 0)) for name in COUNTS})
    says = "\n".join((done.stdout + done.stderr).splitlines()[-LINES:])
    found = {name: counts[name] for name in COUNTS}
    return {"paths": paths, "exit_code": done.returncode, **found, "says": says if done.returncode else ""}
