"""docs/story.md names every file of the package, and none that is gone."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
STORY = (ROOT / "docs" / "story.md").read_text(encoding="utf-8")
NAMED = re.findall(r"\]\(\.\./(fiddler/[^)#]+)\)", STORY)


def only_a_docstring(file: Path) -> bool:
    """Whether a module says what its room is for, and nothing else."""
    if file.name != "__init__.py":
        return False
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return len(body) == 1 and isinstance(body[0], ast.Expr)


def test_every_file_has_its_purpose_in_the_table_of_rooms() -> None:
    table = STORY.partition("\n## The rooms\n")[2]
    there = [f for f in (ROOT / "fiddler").rglob("*") if f.suffix in (".py", ".c", ".h") and "demo" not in f.parts]
    wanted = [f.relative_to(ROOT).as_posix() for f in there if not only_a_docstring(f)]
    assert sorted(re.findall(r"\]\(\.\./(fiddler/[^)]+)\): \S", table)) == sorted(wanted)


def test_every_file_that_is_named_exists() -> None:
    assert [name for name in NAMED if not (ROOT / name).exists()] == []


def test_every_room_is_named() -> None:
    rooms = [f.parent.name for f in (ROOT / "fiddler").glob("*/__init__.py")]
    assert [room for room in rooms if f"**fiddler/{room}**" not in STORY] == []


def test_the_floors_are_those_that_the_linter_keeps() -> None:
    linted = re.search(
        r"\nlayers = \[\n(.*?)\n\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.DOTALL
    )
    assert linted is not None
    floors = [re.findall(r"fiddler\.(\w+)", line) for line in linted[1].splitlines()]
    shown = STORY.partition("```\n")[2].partition("```")[0].splitlines()
    assert [re.findall(r"\w+", line[:28].partition("  ")[0]) for line in shown] == floors
