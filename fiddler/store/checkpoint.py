"""A checkpoint folder's safetensors files, opened without reading a tensor.

The format: eight bytes little-endian header length, a JSON header of dtype, shape and data offsets per tensor, then
the data (https://github.com/huggingface/safetensors#format). safetensors itself validates each header against the
file; the files are then mapped once each, so that neighbouring tensors can be seen as one.
"""

import ctypes
import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fiddler.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: `nbytes` bytes at `offset` of `file`."""

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a folder by name; opened by `Checkpoint.open`."""

    def __init__(self, folder: Path, entries: Mapping[str, Entry]) -> None:
        self.folder = folder
        self.entries: Mapping[str, Entry] = MappingProxyType(dict(entries))
        # Mapped at once: a file replaced later on is then no danger.
        self._mappings = {file: _map(file) for file in {entry.file for entry in entries.values()}}
        self._mapped = {file: _bytes(mapping) for file, mapping in self._mappings.items()}

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the headers of every file of the checkpoint.

        Raises `CheckpointError` for a missing, truncated or unsafe file and for an index that does not match.
        """
        entries: dict[str, Entry] = {}
        for file, expected in _files(folder).items():
            found = _read_header(file)
            missing = sorted(set(expected) - set(found))
            if missing:
                raise CheckpointError(
                    f"{file.name} lacks {missing[0]!r} ({len(missing)} such tensors) that {INDEX} promises in it; "
                    "download the checkpoint again"
                )
            entries.update(found)
        return cls(folder, entries)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as a view of its mapped file. Raises `CheckpointError` if it cannot be viewed."""
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"tensor {name!r} is not in {self.folder}")
        return self._view(name, entry, entry.shape)

    def joined(self, first: str, second: str) -> Tensor | None:
        """Return two matrices that lie back to back in one file as one view `[rows₁ + rows₂, columns]`.

        Returns `None` where they do not.
        """
        a, b = self.entries[first], self.entries[second]
        adjacent = a.file == b.file and a.offset + a.nbytes == b.offset
        if not adjacent or a.dtype != b.dtype or a.shape[1:] != b.shape[1:]:
            return None
        return self._view(first, a, (a.shape[0] + b.shape[0], *a.shape[1:]))

    def release(self, name: str) -> None:
        """Give back the memory that a tensor's pages take; who reads it again gets it from the file again.

        Raises `KeyError` for a tensor that is not in the checkpoint.
        """
        entry = self.entries[name]
        if not hasattr(mmap, "MADV_DONTNEED"):  # Windows: its pages go when others need the memory
            return
        # Outward to whole pages, into the neighbours: nothing is lost, since the mapping is read-only.
        start = entry.offset - entry.offset % mmap.PAGESIZE
        length = entry.offset + entry.nbytes - start
        self._mappings[entry.file].madvise(mmap.MADV_DONTNEED, start, length)

    def _view(self, name: str, entry: Entry, shape: tuple[int, ...]) -> Tensor:
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(f"tensor {name!r} is {entry.dtype}; experts must be one of {', '.join(_DTYPES)}")
        if entry.offset % dtype.itemsize:
            raise CheckpointError(f"tensor {name!r} starts at an odd byte of {entry.file.name}; save it again")
        data = self._mapped[entry.file][entry.offset : entry.offset + prod(shape) * dtype.itemsize]
        return data.view(dtype).view(shape)


def _map(file: Path) -> mmap.mmap:
    """Return a read-only mapping of a file.

    Shared and read-only, so that a file larger than memory can be mapped: a private writable mapping, torch's and
    safetensors' own, is refused by Linux's overcommit accounting.
    """
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _bytes(mapping: mmap.mmap) -> Tensor:
    """Return a mapping's bytes; the tensor keeps it open.

    Through its address: torch warns of a buffer that it may not write, and all threads share one list of filters.
    """
    array = np.frombuffer(mapping, dtype=np.uint8)
    buffer: Any = (ctypes.c_ubyte * array.size).from_address(array.ctypes.data)
    buffer.mapped = array
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _files(folder: Path) -> dict[Path, list[str]]:
    """Return the checkpoint's files, each with the tensors an index promises in it."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; give a checkpoint folder or a hub id that is in the cache"
        )
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: []}
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder} holds pickled weights, which are never opened; convert them to safetensors"
        )
    raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def _indexed(folder: Path) -> dict[Path, list[str]]:
    try:
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        pairs = [(str(tensor), str(name)) for tensor, name in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{INDEX} is not a valid index: {error!r}; download it again") from error
    files: dict[Path, list[str]] = {}
    for tensor, name in pairs:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise CheckpointError(f"{INDEX} names {name!r}, which is not a safetensors file inside {folder}")
        files.setdefault(folder / path, []).append(tensor)
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(files)} files, first {missing[0]}; download them"
        )
    return files


def _read_header(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(str(file), framework="np"):
            pass  # validates the header and that the data it describes is all there
        with file.open("rb") as stream:
            n_header = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(n_header))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is truncated or not safetensors: {error}; download it again") from error
    header.pop("__metadata__", None)
    return {
        name: Entry(
            file,
            8 + n_header + item["data_offsets"][0],
            item["data_offsets"][1] - item["data_offsets"][0],
            item["dtype"],
            tuple(item["shape"]),
        )
        for name, item in header.items()
    }
