"""No tensor of a forward is left on the host: in torch's own shadow of another device, a mix would be an error."""

import subprocess
import sys
from pathlib import Path

NAMES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4", "glm4_moe", "minimax_m2")


def test_forwards_run_on_another_device() -> None:
    command = [sys.executable, "-m", "tests.support.elsewhere", *NAMES]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(NAMES)
