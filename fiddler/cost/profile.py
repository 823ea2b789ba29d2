"""Profiles: machines and model shapes as JSON objects in files, shipped in a folder or the user's own."""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from fiddler.errors import ConfigError
from fiddler.given import read_json


def names(folder: Path) -> list[str]:
    """Return the names of the profiles that a folder ships, sorted."""
    return sorted(path.stem for path in folder.glob("*.json"))


def find(folder: Path, name_or_path: str | Path) -> Path:
    """Return the file of a shipped profile, or of a path as given; `ConfigError` names the profiles there are."""
    shipped = folder / f"{name_or_path}.json"
    if str(name_or_path) in names(folder):
        return shipped
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(
            f"no profile {str(name_or_path)!r}; give the path of a JSON file, or one of: {', '.join(names(folder))}"
        )
    return path


def read(path: Path, required: Set[str], optional: Set[str] = frozenset()) -> dict[str, Any]:
    """Return the object in a file; `ConfigError` names the file and every unknown or missing key."""
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    return keyed(value, str(path), required, optional)


def keyed(value: object, where: str, required: Set[str], optional: Set[str] = frozenset()) -> dict[str, Any]:
    """Return an object whose keys are the required ones and some of the optional; else `ConfigError`."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: must be a JSON object")
    unknown = sorted(set(value) - required - optional)
    if unknown:
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)}")
    missing = sorted(required - set(value))
    if missing:
        raise ConfigError(f"{where}: missing key {', '.join(missing)}")
    return dict(value)


def text(value: object, where: str) -> str:
    """Return a text that says something; else `ConfigError`."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: must be a text that is not empty")
    return value
