"""docs/guide.md names every option, its figures are the shapes', and its programs and commands run."""

import ast
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import fiddler
from fiddler import EngineConfig
from fiddler.cli import app
from fiddler.lab.shape import ModelShape

GUIDE = (Path(__file__).parent.parent / "docs" / "guide.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL) for line in block.splitlines()]
RECORD = "record"
"""The command that records routing; `trace` is its old name."""
CODE = re.findall(r"`([^`\n]+)`", GUIDE)


def section(title: str) -> str:
    return GUIDE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def commands() -> dict[str, Any]:
    found: dict[str, Any] = typer.main.get_command(app._application).commands  # type: ignore[attr-defined]
    return found


def flags() -> set[str]:
    """Return every spelling of every option of every command."""
    spellings = {name for c in commands().values() for p in c.params for name in (*p.opts, *p.secondary_opts)}
    return {name for name in spellings if name.startswith("-")}


def test_every_field_of_the_configuration_has_a_row_and_no_other_has_one() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", section("Engine options"), re.MULTILINE)
    assert sorted(rows) == sorted(f.name for f in fields(EngineConfig))


def test_every_option_of_every_command_is_named_and_no_other() -> None:
    named = {name for name in CODE if re.fullmatch(r"--?[a-z-]+", name)}
    general = {"--help", "--version", "--install-completion", "--show-completion"}
    assert named - general == flags()


def test_every_command_is_named() -> None:
    shown = {name for name, command in commands().items() if not command.hidden}
    shown = {RECORD if name == "trace" else name for name in shown}
    assert set(re.findall(r"^\| `fiddler (\w+)` \|", GUIDE, re.MULTILINE)) == shown


def test_every_error_of_the_tree_that_ends_in_a_message_is_explained() -> None:
    roots = {"FiddlerError", "RequestError", "EngineError"}
    errors = {name for name in fiddler.__all__ if name.endswith("Error")}
    assert errors - roots <= set(CODE)


def test_messages_are_those_of_the_code() -> None:
    said: list[str] = []
    for file in Path(fiddler.__file__).parent.rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        said += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    quoted = re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", section("Troubleshooting"))
    assert len(quoted) > 20
    parts = [
        part.strip() for message in quoted for part in message.split("\N{HORIZONTAL ELLIPSIS}") if part.strip()
    ]
    assert [part for part in parts if not any(part in text for text in said)] == []


def test_figures_of_memory_are_those_of_the_shapes() -> None:
    rows = re.findall(
        r"^\| ([a-z0-9-]+)(?: \(.*?\))? \| (\d[^|]*) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", GUIDE, re.M
    )
    assert len(rows) == 4
    for name, *said in rows:
        shape = ModelShape.load(name)
        kv = 1000 * (shape.n_layers + shape.n_dense_layers) * shape.kv_bytes_per_token
        assert said == [
            f"{shape.total_experts * shape.expert_bytes / 1e9:.1f} GB",
            f"{shape.expert_bytes / 1e6:.1f} MB",
            f"{shape.resident_bytes / 1e9:.1f} GB",
            f"{kv / 1e6:.0f} MB",
            f"{shape.n_layers * shape.top_k * shape.expert_bytes / 1e9:.1f} GB",
        ]


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_every_program_runs_as_it_stands(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(PROGRAMS[number], f"program {number}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_every_command_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a later one reads what an earlier one wrote
    assert COMMANDS
    for line in COMMANDS:
        program, command, *arguments = shlex.split(line)
        assert program == "fiddler"
        arguments = ["trace" if command == RECORD and RECORD not in commands() else command, *arguments]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, (line, done.output)
        assert done.stdout.strip(), line
