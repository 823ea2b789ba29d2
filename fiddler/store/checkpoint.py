"""A checkpoint folder's safetensors files, opened without reading a tensor.

The format: eight bytes little-endian header length, a JSON header of dtype, shape and data offsets per tensor, then
the data (https://github.com/huggingface/safetensors#format). safetensors itself validates each header against the
file; the files are then mapped once each, so that neighbouring tensors can be seen as one.
"""

import json
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fiddler.errors import CheckpointError
from fiddler.given import open_regular
from fiddler.store.folder import INDEX, weight_files
from fiddler.store.mapping import Mapping

EXPERT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of experts' tensors, by their names in a header."""
EXPERT_NAMES = f"one of {', '.join(EXPERT_DTYPES)}"

_DTYPES = EXPERT_DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "BOOL": torch.bool,
    **{f"I{n}": getattr(torch, f"int{n}") for n in (8, 16, 32, 64)},
    **{f"U{n}": getattr(torch, f"uint{n}") for n in (8, 16, 32, 64)},
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: `nbytes` bytes at `offset` of `file`."""

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a folder by name; opened by `Checkpoint.open`.

    A tensor at a byte from which its numbers cannot be read is copied when asked for; all others are views.
    """

    def __init__(self, folder: Path, entries: MappingOf[str, Entry], mappings: MappingOf[Path, Mapping]) -> None:
        self.folder = folder
        self.entries: MappingOf[str, Entry] = MappingProxyType(dict(entries))
        # Mapped at once: a file replaced later on is then no danger.
        self._mappings = dict(mappings)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the headers of every file of the checkpoint; `store.folder` says which these are.

        Raises `CheckpointError` for a missing, truncated or unsafe file and for an index that does not match.
        """
        entries: dict[str, Entry] = {}
        mappings: dict[Path, Mapping] = {}
        for file, expected in weight_files(folder).items():
            opened = _open(file)
            missing = sorted(set(expected) - set(opened.entries))
            if missing:
                raise CheckpointError(
                    f"{file.name} lacks {missing[0]!r} ({len(missing)} such tensors) that {INDEX} promises in it; "
                    "download the checkpoint again"
                )
            entries.update(opened.entries)
            mappings[file] = opened.mapping
        if gone := [mapping.file for mapping in mappings.values() if not mapping.in_place()]:
            raise CheckpointError(
                f"{gone[0]} was replaced while it was opened; open the model again once all files are whole"
            )
        return cls(folder, entries, mappings)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files it is made of."""
        return tuple(self._mappings)

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor, or the part of it at `index` of its first dimension.

        Raises `CheckpointError` if it is not there, or of a dtype torch does not have.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"tensor {name!r} is not in {self.folder}")
        if index is None:
            return self._view(name, entry, entry.shape)
        nbytes = entry.nbytes // entry.shape[0]
        return self._view(name, replace(entry, offset=entry.offset + index * nbytes), entry.shape[1:])

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
        """Give back the memory of a tensor's pages; a later read gets them from the file again.

        Raises `KeyError` for a tensor that is not in the checkpoint.
        """
        entry = self.entries[name]
        self._mappings[entry.file].release(entry.offset, entry.nbytes)

    def check(self) -> None:
        """Raise `CheckpointError` if a file was changed since it was opened: `Mapping.check`, about 2 us a file."""
        for mapping in self._mappings.values():
            mapping.check()

    def _view(self, name: str, entry: Entry, shape: tuple[int, ...]) -> Tensor:
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(f"tensor {name!r} is {entry.dtype}, which torch does not have")
        data = self._mappings[entry.file].bytes[entry.offset : entry.offset + prod(shape) * dtype.itemsize]
        if entry.offset % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A mapped file with its header."""

    mapping: Mapping
    entries: dict[str, Entry]


def _open(file: Path) -> _Opened:
    try:
        with open_regular(file) as stream:  # first: it says why, where safetensors calls every fault a missing file
            with safe_open(str(file), framework="np"):
                pass  # validates the header and that the data it describes is all there
            mapping = Mapping(file, stream)
            n_header = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(n_header))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file} is truncated or not safetensors: {error}; download it again") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be opened: {error}") from error
    header.pop("__metadata__", None)
    return _Opened(mapping, {name: _entry(file, 8 + n_header, item) for name, item in header.items()})


def _entry(file: Path, start: int, item: Any) -> Entry:
    begin, end = item["data_offsets"]
    return Entry(file, start + begin, end - begin, item["dtype"], tuple(item["shape"]))
