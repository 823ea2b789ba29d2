"""Every bench runs as a module, latency as a script from anywhere too; none imports another in a circle."""

import ast
import runpy
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import bench

FOLDER = Path(bench.__file__).parent
BENCHES = sorted(
    ".".join(file.relative_to(FOLDER.parent).with_suffix("").parts).removesuffix(".__main__")
    for file in FOLDER.rglob("*.py")
    if '__name__ == "__main__"' in file.read_text(encoding="utf-8") or file.name == "__main__.py"
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


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", BENCHES)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module(name, run_name="__main__")
    assert not left.value.code
    assert "usage: " in capsys.readouterr().out


def test_a_script_finds_the_project_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(FOLDER / "latency.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--scenario" in done.stdout


def test_a_script_s_neighbours_do_not_pass_for_other_packages(tmp_path: Path) -> None:
    """transformers imports a package `kernels` where there is one; Python puts a script's folder first."""
    names = [file.stem for file in FOLDER.glob("*.py")]
    script = SHOWS_NAMES.format(folder=str(FOLDER), file=str(FOLDER / "latency.py"), names=names)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, [""]), done.stderr


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield what a module may import, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_module_imports_another_in_a_circle_and_none_imports_late() -> None:
    files = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FOLDER.rglob("*.py")}
    trees = {".".join(file.relative_to(FOLDER.parent).with_suffix("").parts): tree for file, tree in files.items()}
    needs = {name: {other for other in imported(tree) if other in trees} for name, tree in trees.items()}
    assert list(TopologicalSorter(needs).static_order())  # raises CycleError
    functions = [
        (name, node) for name, tree in trees.items() for node in ast.walk(tree) if hasattr(node, "decorator_list")
    ]
    late = [
        name
        for name, node in functions
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    assert late == []
