"""A checkpoint folder's safetensors files, opened without reading a tensor.

`entries` are the tensors by the names that a bf16 checkpoint gives them: `formats.find` puts a quantised one in the
place of the stored tensors that make it.

The format: eight bytes little-endian header length, a JSON header of dtype, shape and data offsets per tensor, then
the data (https://github.com/huggingface/safetensors#format). safetensors itself validates each header against the
file; the files are then mapped once each, so that neighbouring tensors can be seen as one.
"""

import json
from collections.abc import Generator
from collections.abc import Mapping as MappingOf
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fiddler.errors import CheckpointError
from fiddler.formats.names import groups
from fiddler.formats.packed import Packed
from fiddler.formats.quantised import Quantised
from fiddler.given import open_regular
from fiddler.store.folder import CONFIG, INDEX, is_file, quantisation, read_raw, weight_files
from fiddler.store.mapping import Mapping

EXPERT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of experts' tensors, by their names in a header."""
EXPERT_NAMES = f"one of {', '.join(EXPERT_DTYPES)}, or quantised"

_DTYPES = EXPERT_DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
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

    is_gguf = False
    """Whether experts have GGUF's names: `models.gguf_experts` finds them, and gate lies before up."""

    def __init__(
        self,
        folder: Path,
        stored: MappingOf[str, Entry],
        mappings: MappingOf[Path, Mapping],
    ) -> None:
        self.folder = folder
        self.headers: MappingOf[str, Entry] = MappingProxyType(dict(stored))
        """The tensors as they are stored."""
        self.entries: MappingOf[str, Entry | Quantised] = self.headers
        # Mapped at once: a file replaced later on is then no danger.
        self._mappings = dict(mappings)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the headers of every file of the checkpoint; `store.folder` says which these are.

        Raises `CheckpointError` for a missing, truncated or unsafe file and for an index that does not match, and
        `UnsupportedModelError` for a quantised tensor of a format that is not read.
        """
        stored: dict[str, Entry] = {}
        mappings: dict[Path, Mapping] = {}
        for file, expected in weight_files(folder).items():
            opened = _open(file)
            missing = sorted(set(expected) - set(opened.entries))
            if missing:
                raise CheckpointError(
                    f"{file.name} lacks {missing[0]!r} ({len(missing)} such tensors) that {INDEX} promises in it; "
                    "download the checkpoint again"
                )
            stored.update(opened.entries)
            mappings[file] = opened.mapping
        if gone := [mapping.file for mapping in mappings.values() if not mapping.in_place()]:
            raise CheckpointError(
                f"{gone[0]} was replaced while it was opened; open the model again once all files are whole"
            )
        checkpoint = cls(folder, stored, mappings)
        checkpoint._find_quantised()
        return checkpoint

    def _find_quantised(self) -> None:
        found = groups(self.headers)
        if not found:
            return
        from fiddler.formats.find import find  # every format's reader, which most checkpoints do without

        settings = quantisation(read_raw(self.folder)) if is_file(self.folder / CONFIG) else {}
        self.entries = MappingProxyType(find(found, self.headers, settings, self))

    @property
    def files(self) -> tuple[Path, ...]:
        """The files it is made of."""
        return tuple(self._mappings)

    def tensor(self, name: str, index: int | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor, or the part of it at `index` of its first dimension.

        A quantised one is returned whole, in floats of `dtype`. Raises `CheckpointError` if it is not there, or of
        a dtype torch does not have.
        """
        entry = self._entry(name)
        if isinstance(entry, Entry):
            return self.stored(name, index)
        assert index is None
        with _reading(name):
            return entry.dense(self, dtype)

    def matrices(self, name: str, index: int | None = None) -> tuple[Packed, ...]:
        """Return a quantised matrix, or the one at `index`; several, row under row, where their factors differ.

        Raises `CheckpointError` where its parts do not belong together.
        """
        entry = self._entry(name)
        assert isinstance(entry, Quantised)
        with _reading(name):
            return entry.read(self, index)

    def stored(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor by its name in the files, or the part of it at `index` of its first dimension.

        Raises `CheckpointError` if it is not there, or of a dtype torch does not have.
        """
        entry = self.headers.get(name)
        if entry is None:
            raise CheckpointError(f"tensor {name!r} is not in {self.folder}")
        if index is None:
            return self._view(name, entry, entry.shape)
        nbytes = entry.nbytes // entry.shape[0]
        return self._view(name, replace(entry, offset=entry.offset + index * nbytes), entry.shape[1:])

    def _entry(self, name: str) -> Entry | Quantised:
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"tensor {name!r} is not in {self.folder}")
        return entry

    def joined(self, first: str, second: str) -> Tensor | None:
        """Return two matrices that lie back to back in one file as one view `[rows₁ + rows₂, columns]`.

        Returns `None` where they do not, and for quantised ones.
        """
        a, b = self.entries[first], self.entries[second]
        if not (isinstance(a, Entry) and isinstance(b, Entry)):
            return None
        adjacent = a.file == b.file and a.offset + a.nbytes == b.offset
        if not adjacent or a.dtype != b.dtype or a.shape[1:] != b.shape[1:]:
            return None
        return self._view(first, a, (a.shape[0] + b.shape[0], *a.shape[1:]))

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's pages; a later read gets them from the file again.

        Raises `KeyError` for a tensor that is not in the checkpoint.
        """
        entry = self.entries[name]
        for part in (entry,) if isinstance(entry, Entry) else map(self.headers.__getitem__, entry.parts.values()):
            self._mappings[part.file].release(part.offset, part.nbytes)

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


@contextmanager
def _reading(name: str) -> Generator[None]:
    """Turn errors of parts that do not fit each other, torch's among them, into a `CheckpointError`."""
    try:
        yield
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"parts of {name!r} do not fit each other: {error}; download them again") from error


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
