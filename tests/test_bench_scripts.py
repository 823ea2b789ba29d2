"""Every bench runs as a script from anywhere, and as a module."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import bench

FOLDER = Path(bench.__file__).parent
SCRIPTS = sorted(
    file for file in FOLDER.glob("*.py") if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
)
SHOWS_NAMES = """
import runpy, sys
sys.path[0] = {folder!r}
sys.argv = [{file!r}, "--help"]
try:
    runpy.run_path({file!r}, run_name="__main__")
except SystemExit as left:
    assert not left.code
    import transformers.modeling_utils
    print(*(name for name in {names!r} if name in sys.modules))
"""


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_help_as_a_script(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(file), run_name="__main__")
    assert not left.value.code
    assert "usage: " in capsys.readouterr().out


def test_a_script_finds_the_project_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(FOLDER / "prefill.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--lengths" in done.stdout


def test_a_script_s_neighbours_do_not_pass_for_other_packages(tmp_path: Path) -> None:
    """transformers imports a package `kernels` where there is one; Python puts a script's folder first."""
    names = [file.stem for file in FOLDER.glob("*.py")]
    script = SHOWS_NAMES.format(folder=str(FOLDER), file=str(FOLDER / "prefill.py"), names=names)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, [""]), done.stderr
