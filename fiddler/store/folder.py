"""Finds a checkpoint, given as a path or as a hub id, and its files; says what lies there where there is none.

Nothing here imports torch or transformers, so a command can refuse a folder at once.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from fiddler.errors import CheckpointError, ModelError, UnsupportedModelError
from fiddler.given import read_json
from fiddler.store.gguf_parts import SUFFIX, all_parts, begins_as_gguf, firsts, is_gguf, refuse_other

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

Files = dict[Path, tuple[str, ...]]
"""A checkpoint's files in the order in which they are read, each with the tensors that an index promises in it."""

_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\S+))?", re.ASCII)


def find_checkpoint(model: str | Path, *, download: bool = True) -> Path:
    """Return the folder of a checkpoint given as a path or as a hub id, `owner/model` or `owner/model@revision`.

    A GGUF file is a checkpoint by itself: its path is returned, or that of its first part. A hub id is looked up
    in the local hub cache first and downloaded if it is not whole there and `download` allows it. Raises
    `CheckpointError` or `UnsupportedModelError` if there is no checkpoint; the message says what lies there.
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
    if is_gguf(path):
        refuse_pointer(path)
        refuse_other(path)
        return all_parts(path)[0]
    if os.path.lexists(path):
        raise _no_folder(path)
    if name.lower().endswith(SUFFIX):  # else it would be asked for at the hub
        raise CheckpointError(
            f"{name} is not there; give the path of a {SUFFIX} file, and fetch one of the hub's with "
            "`hf download OWNER/MODEL FILE.gguf --local-dir .`"
        )
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
    if begins_as_gguf(path):
        return CheckpointError(f"{path} holds GGUF; give it, or a link to it, a name that ends in {SUFFIX}")
    if name.endswith(_ARCHIVES):
        return CheckpointError(f"{path} is an archive; unpack it and give the folder")
    if name.endswith(_PICKLED):
        return CheckpointError(
            f"{path} holds pickled weights, which are never opened; give a safetensors checkpoint"
        )
    if name.endswith((".safetensors", ".json")):
        return CheckpointError(f"{path} is one file of a checkpoint; give its folder, {path.absolute().parent}")
    return CheckpointError(
        f"{path} is a file, not a folder; give a checkpoint's folder, a {SUFFIX} file or a hub id (owner/model)"
    )


def check_folder(folder: Path) -> None:
    """Raise `CheckpointError` or `UnsupportedModelError` for a folder that cannot be opened, by what lies in it."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a checkpoint's folder or a hub id (owner/model)")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise CheckpointError(f"{folder} cannot be read: permission denied")
    if not os.path.lexists(folder / CONFIG):
        raise _no_checkpoint(folder)
    read_raw(folder)
    if is_file(folder / ADAPTER):
        raise _adapter(folder)
    weight_files(folder)
    refuse_pointer(folder / "tokenizer.json")  # looked at again once the model is loaded, which takes long


def read_raw(folder: Path) -> dict[str, Any]:
    """Return a folder's `config.json` as it stands. Raises `CheckpointError`."""
    file = folder / CONFIG
    try:
        raw = read_json(file)
    except (OSError, ValueError) as error:
        refuse_pointer(file)
        raise CheckpointError(
            f"{file} is missing or not JSON: this is not a transformers checkpoint ({error})"
        ) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} is not a JSON object: this is not a transformers checkpoint")
    return raw


QUANTISATION = ("quantization_config", "compression_config", "quantization")
"""Keys that describe a quantised checkpoint; the last is mlx's. A multimodal model's text part may have its own."""


def parts_of(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a configuration and those in it, as of a multimodal model's text."""
    return [raw, *(value for value in raw.values() if isinstance(value, Mapping))]


def quantisation(raw: dict[str, Any]) -> dict[str, Any]:
    """Return how a configuration says that its checkpoint is quantised; empty where it does not."""
    for part in parts_of(raw):
        for name in QUANTISATION:
            if (found := part.get(name)) is not None:
                return found if isinstance(found, dict) else {"quant_method": found}
    return {}


def weight_files(folder: Path) -> Files:
    """Return the files that transformers would read, later ones winning where a tensor is in several.

    That is the file which `config.json` names as `transformers_weights`, or `SINGLE`, or what `INDEX` names: see
    `_get_resolved_checkpoint_files` in transformers' modeling_utils.py. Raises `CheckpointError`.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a checkpoint's folder or a hub id (owner/model)")
    files = promised_files(folder)
    if not files:
        raise _no_weights(folder)
    missing = sorted(file.name for file in files if not is_file(file))
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(files)} files, first {missing[0]}; download them"
        )
    for file in files:
        refuse_pointer(file)
    return files


def promised_files(folder: Path) -> Files:
    """Return the files that would be the checkpoint, whether they are there or not. Raises `CheckpointError`."""
    name = named_weights(folder) or next((n for n in (SINGLE, INDEX) if is_file(folder / n)), None)
    if name is None:
        return {}
    return _indexed(folder, name) if name.endswith(".json") else {folder / name: ()}


def named_weights(folder: Path) -> str | None:
    """Return the file or the index that `config.json` names, if it does. Raises `CheckpointError`."""
    name = read_raw(folder).get("transformers_weights") if is_file(folder / CONFIG) else None
    if name is None:
        return None
    if not _inside(name, (".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"{CONFIG} names {name!r} as transformers_weights, which is not a safetensors file inside {folder}"
        )
    return str(name)


def _indexed(folder: Path, index: str) -> Files:
    try:
        weight_map: dict[str, str] = read_json(folder / index)["weight_map"]
        pairs = [(str(tensor), str(name)) for tensor, name in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        refuse_pointer(folder / index)
        raise CheckpointError(f"{index} is not a valid index: {error!r}; download it again") from error
    promised: dict[str, list[str]] = {}
    for tensor, name in pairs:
        promised.setdefault(name, []).append(tensor)
    for name in promised:
        if not _inside(name, (".safetensors",)):
            raise CheckpointError(f"{index} names {name!r}, which is not a safetensors file inside {folder}")
    if not promised:
        raise CheckpointError(f"{index} names no file; download it again")
    return {folder / name: tuple(promised[name]) for name in sorted(promised)}  # transformers' order


def is_file(file: Path) -> bool:
    """Whether a file is there and accessible: its name may be too long, or its folder closed to us."""
    return _holds(file, Path.is_file)


def _holds(path: Path, check: Callable[[Path], bool]) -> bool:
    try:
        return check(path)
    except OSError:
        return False


def _inside(name: object, suffixes: tuple[str, ...]) -> bool:
    """Whether a file's name is one of a folder's own, or of its sub folders'."""
    path = PurePosixPath(str(name))
    return isinstance(name, str) and not path.is_absolute() and ".." not in path.parts and name.endswith(suffixes)


def _no_checkpoint(folder: Path) -> CheckpointError | UnsupportedModelError:
    """Return the reason why a folder without a configuration is no checkpoint."""
    names = _names(folder)
    if not names:
        return CheckpointError(f"{folder} is empty; download the checkpoint into it, or give its hub id")
    if ADAPTER in names:
        return _adapter(folder)
    if _with(names, ".gguf"):
        return _gguf(folder, names)
    if "params.json" in names:
        return UnsupportedModelError(
            f"{folder} holds weights in their maker's own format (params.json); give the transformers version"
        )
    for below in _folders(folder):
        if is_file(below / CONFIG):
            return CheckpointError(f"{folder} has no {CONFIG}, but its sub folder has: give {below}")
    return CheckpointError(f"{folder / CONFIG} is missing: this is not a transformers checkpoint")


def _no_weights(folder: Path) -> CheckpointError | UnsupportedModelError:
    """Return the reason why a folder has no weights that can be read."""
    names = _names(folder)
    if broken := {SINGLE, INDEX}.intersection(names):
        return CheckpointError(
            f"{folder / broken.pop()} is not a regular file, or links to nothing readable; download it again"
        )
    if _with(names, ".gguf"):
        return _gguf(folder, names)
    if _with(names, *_PICKLED):
        return CheckpointError(
            f"{folder} holds pickled weights, which are never opened; convert them to safetensors"
        )
    if found := _with(names, ".safetensors"):
        return CheckpointError(
            f"{folder} holds {found[0]}, but neither {SINGLE} nor {INDEX}, which names the files; download it again"
        )
    for below in _folders(folder):
        if _with(_names(below), ".safetensors"):
            return CheckpointError(
                f"{folder} holds no weights, but its sub folder does: give {below}, with {CONFIG} beside them"
            )
    return CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}; download the weights as well")


def _adapter(folder: Path) -> UnsupportedModelError:
    try:
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    of = f" of {base}" if isinstance(base, str) else ""
    return UnsupportedModelError(
        f"{folder} holds an adapter (LoRA){of}, which Fiddler does not apply; merge it into its base model "
        f"(peft: merge_and_unload) and give that folder without {ADAPTER}"
    )


def _gguf(folder: Path, names: list[str]) -> CheckpointError:
    given = [str(folder / name) for name in firsts(names)] or ["its first part, which is missing"]
    more = f" or another of {len(given)}" if len(given) > 1 else ""
    return CheckpointError(f"{folder} holds GGUF files, and no safetensors; give a file: {given[0]}{more}")


_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(file: Path) -> None:
    """Raise `CheckpointError` for the pointer file that git leaves where git-lfs is missing."""
    try:
        if not file.is_file():
            return
        with file.open("rb") as stream:
            found = stream.read(len(_POINTER)) == _POINTER
    except OSError:
        return
    if found:
        raise CheckpointError(
            f"{file} is a git-lfs pointer and not the file itself; run `git lfs pull` in the folder, or download it"
        )


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def _with(names: list[str], *suffixes: str) -> list[str]:
    return [name for name in names if name.lower().endswith(suffixes)]


def _folders(folder: Path) -> Iterator[Path]:
    """Yield the sub folders, and those of `snapshots`, where the hub's cache has a model's revisions."""
    yield from (below for name in _names(folder) if _holds(below := folder / name, Path.is_dir) and name[0] != ".")
    yield from (folder / "snapshots" / revision for revision in _names(folder / "snapshots"))
