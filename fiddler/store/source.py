"""Finds a model given as a path or as a hub id. Imports neither torch nor transformers."""

import os
import re
from pathlib import Path

from fiddler.errors import CheckpointError, ModelError, UnsupportedModelError
from fiddler.store.folder import check_folder

_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\S+))?", re.ASCII)


def find_checkpoint(model: str | Path, *, download: bool = True) -> Path:
    """Return the folder of a checkpoint given as a path or as a hub id, `owner/model` or `owner/model@revision`.

    A hub id is looked up in the local hub cache first and downloaded if it is not whole there and `download` allows
    it. Raises `CheckpointError` or `UnsupportedModelError` if there is no checkpoint; the message says what lies
    there.
    """
    if not isinstance(model, str | os.PathLike):
        raise CheckpointError(f"a model is a folder or a hub id, not {type(model).__name__}")
    name = os.fsdecode(model)
    if not name or "\0" in name:
        raise CheckpointError(f"{name!r} is neither a checkpoint folder nor a hub id (owner/model)")
    path = _expanded(name)
    if path.is_dir():
        check_folder(path)
        return path
    if os.path.lexists(path):
        raise _no_folder(path)
    hub_id = _HUB_ID.fullmatch(name) if isinstance(model, str) else None
    if hub_id is None:
        raise CheckpointError(f"{name} is neither a checkpoint folder nor a hub id (owner/model)")
    from fiddler.store.hub import find_on_hub  # takes half a second, which folders need not wait for

    return find_on_hub(hub_id["name"], hub_id["revision"], download=download)


def _expanded(name: str) -> Path:
    try:
        path = Path(name).expanduser()
        path.is_dir()  # a name too long, or a folder that nobody may enter
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be looked for: {error}") from error
    return path


_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".zst", ".7z", ".rar")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def _no_folder(path: Path) -> ModelError:
    """Return the reason why a path that is no folder is no checkpoint."""
    name = path.name.lower()
    if not path.exists():
        return CheckpointError(f"{path} is a link to nothing")
    if not path.is_file():
        return CheckpointError(f"{path} is neither a folder nor a file")
    if name.endswith(".gguf"):
        return UnsupportedModelError(
            f"{path} is a GGUF file, llama.cpp's format; Fiddler reads safetensors: give the checkpoint that it "
            "was made from"
        )
    if name.endswith(_ARCHIVES):
        return CheckpointError(f"{path} is an archive; unpack it and give the folder")
    if name.endswith(_PICKLED):
        return CheckpointError(
            f"{path} holds pickled weights, which are never opened; give a safetensors checkpoint"
        )
    if name.endswith((".safetensors", ".json")):
        return CheckpointError(f"{path} is one file of a checkpoint; give its folder, {path.absolute().parent}")
    return CheckpointError(f"{path} is a file, not a folder; give a checkpoint's folder or a hub id (owner/model)")
