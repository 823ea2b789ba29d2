"""A folder that a checkpoint is written into: its files are there whole or not at all, and a later run keeps them.

Each file of weights notes in its metadata the conversion that wrote it, so files of two are never mixed. The
configuration comes last: a folder without it is unfinished.
"""

import json
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fiddler.errors import ConfigError
from fiddler.store.folder import CONFIG

MADE_BY = "fiddler"
"""Key of a file's metadata: the digest of its conversion, and its errors by layer."""
UNFINISHED = ".unfinished"
"""Folder of the files that are being written: safetensors leaves its own there when a run is killed."""
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")

Noted = Mapping[Any, tuple[float, float]]
"""Sums of squares by layer, of what rounding changed and of the numbers."""


@dataclass(frozen=True, slots=True)
class Target:
    """A folder and the conversion that it is for."""

    folder: Path
    made_from: str
    """Digest of the source and the way it is quantised."""

    def check(self, source: Path) -> None:
        """Raise `ConfigError` for a folder that holds anything but files of the same conversion."""
        folder = self.folder
        if folder.resolve() == source.resolve():
            raise ConfigError(f"{folder} is the checkpoint itself; give another folder")
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; give another")
        try:
            found = sorted(folder.rglob("*")) if folder.is_dir() else []
        except OSError as error:
            raise ConfigError(f"{folder} cannot be read: {error}; give another") from error
        found = [file for file in found if file.relative_to(folder).parts[0] != UNFINISHED]
        weights = [file for file in found if file.suffix == ".safetensors"]
        if found and not (weights and all(self.noted(file) is not None for file in weights)):
            raise ConfigError(
                f"{folder} is not empty, and not of the same conversion; give another folder, or empty it"
            )

    @contextmanager
    def writing(self) -> Generator[None]:
        """Make the folder, and clear what a killed run left. Raises `ConfigError` where it cannot be written."""
        unfinished = self.folder / UNFINISHED
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            yield
            unfinished.rmdir()
        except (OSError, SafetensorError) as error:  # a full disk is one of safetensors' own
            raise ConfigError(
                f"{self.folder} cannot be written: {error}; free some space, or give another"
            ) from error

    def noted(self, file: Path) -> Noted | None:
        """Return the errors that a file of the same conversion notes; `None` for any other, or a damaged one."""
        try:
            with safe_open(str(file), framework="pt") as opened:
                noted = json.loads((opened.metadata() or {})[MADE_BY])
                errors: Noted = noted["errors"]
                return errors if noted["from"] == self.made_from else None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None

    def names(self, name: str) -> list[str]:
        """Return the names of a file's tensors."""
        with safe_open(str(self.folder / name), framework="pt") as opened:
            return list(opened.keys())

    def tensor_bytes(self, name: str) -> int:
        """Return the bytes behind the header of a file of tensors."""
        file = self.folder / name
        with file.open("rb") as stream:
            return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")

    def write_tensors(self, name: str, content: dict[str, Tensor], errors: Noted, *, like: Path) -> None:
        """Write a file of tensors, with the permissions of `like`."""
        metadata = {"format": "pt", MADE_BY: json.dumps({"from": self.made_from, "errors": errors})}
        with self._whole(name) as file:
            save_file(content, file, metadata)
            shutil.copymode(like, file)  # it is made for its owner alone

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        with self._whole(name) as file:
            file.write_text(json.dumps(content, indent=2) + "\n")

    def copy_others(self, source: Path) -> None:
        """Copy tokenizer, templates, code: every file at the top but weights and the configuration."""
        for file in source.iterdir():
            if file.is_file() and file.name != CONFIG and not file.name.endswith(_WEIGHTS):
                shutil.copyfile(file, self.folder / file.name)

    @contextmanager
    def _whole(self, name: str) -> Generator[Path]:
        """Give a file to write, which gets its place when it is whole."""
        partial, file = self.folder / UNFINISHED / Path(name).name, self.folder / name
        yield partial
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(file)
