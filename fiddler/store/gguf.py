"""The header of a GGUF file: what the file says of its model, and where its tensors lie.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, two counts, then key-value
pairs, then a name, sizes, type and offset for each tensor, all little-endian, then the aligned data. gguf-py's own
reader takes seconds for the words of a vocabulary; this one takes milliseconds, and believes no count or offset.
"""

import struct
from collections.abc import Container
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fiddler.errors import CheckpointError, UnsupportedModelError
from fiddler.formats.gguf import package
from fiddler.store.gguf_parts import MAGIC

VERSIONS = (2, 3)
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types that are no blocks, by their names in safetensors and in gguf-py."""

_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
"""Formats of single values by the numbers of their types."""
_MOST_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_MOST_BYTES = 1 << 26
"""Limit for a header: the words of the largest vocabularies take a quarter of it."""


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor of a file."""

    name: str
    kind: str
    """Type, as gguf-py names it."""
    shape: tuple[int, ...]
    """The outermost first, unlike in the file."""
    row_bytes: int
    offset: int
    """From the start of the file."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True, slots=True)
class Header:
    """All that comes before the data."""

    metadata: dict[str, Any]
    """Values by key; of a list of strings only its length, unless it was asked for."""
    tensors: tuple[Described, ...]


def read_header(data: memoryview, file: Path, keep: Container[str] = ()) -> Header:
    """Read the header of a file whose bytes are `data`; lists of strings are kept for the keys in `keep`.

    Raises `CheckpointError` for a file that is damaged or none of GGUF, `UnsupportedModelError` for one of another
    version or with tensors of an unknown type.
    """
    try:
        return _header(_Bytes(data[:_MOST_BYTES]), len(data), keep)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{file}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is truncated or not GGUF: {error}; download it again") from error


class _Bytes:
    """Reads values one after the other. Raises `ValueError` where the bytes end before one does."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def values(self, layout: str, n: int = 1) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{layout}") * n
        start = self._skip(size)
        return struct.unpack_from(f"<{n}{layout}" if len(layout) == 1 else f"<{layout}", self.data, start)

    def one(self, layout: str) -> Any:
        return self.values(layout)[0]

    def text(self) -> str:
        n: int = self.one("Q")
        start = self._skip(n)
        return str(self.data[start : self.at], "utf-8")

    def skip_text(self) -> None:
        self._skip(self.one("Q"))

    def room_for(self, n: int, least: int) -> int:
        """Return a count; what is counted takes `least` bytes or more each."""
        if n * least > len(self.data) - self.at:
            raise ValueError(f"it counts {n} of what takes {least} bytes or more each, in {len(self.data)} bytes")
        return n

    def _skip(self, n: int) -> int:
        start = self.at
        if n > len(self.data) - start:
            raise ValueError(f"{n} bytes are due at {start} of {len(self.data)}")
        self.at += n
        return start


def _header(data: _Bytes, end: int, keep: Container[str]) -> Header:
    if bytes(data.values("4s")[0]) != MAGIC:
        raise ValueError(f"it does not begin with {MAGIC.decode()}")
    version = data.one("I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        kind = "its numbers are big-endian" if swapped else f"it is of version {version}"
        raise UnsupportedModelError(f"{kind}; Fiddler reads little-endian GGUF of version 2 or 3")
    n_tensors, n_keys = data.values("QQ")
    metadata: dict[str, Any] = {}
    for _ in range(data.room_for(n_keys, 13)):
        key = data.text()
        metadata[key] = _value(data, data.one("I"), keep=key in keep)
    stated = [_stated(data) for _ in range(data.room_for(n_tensors, 24))]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment}, and no power of two")
    start = -(-data.at // alignment) * alignment
    tensors = tuple(_described(*each, start, alignment, end) for each in stated)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("it has two tensors of one name")
    return Header(metadata, tensors)


def _value(data: _Bytes, kind: int, *, keep: bool) -> Any:
    if (layout := _SCALARS.get(kind)) is not None:
        return data.one(layout)
    if kind == _STRING:
        return data.text()
    if kind != _ARRAY:
        raise ValueError(f"it has a value of type {kind}, which GGUF does not know")
    of, n = data.values("IQ")
    if (layout := _SCALARS.get(of)) is not None:
        return list(data.values(layout, data.room_for(n, struct.calcsize(f"<{layout}"))))
    data.room_for(n, 8)
    if of == _STRING and not keep:
        for _ in range(n):
            data.skip_text()
        return n
    return [_value(data, of, keep=keep) for _ in range(n)]


def _stated(data: _Bytes) -> tuple[str, tuple[int, ...], int, int]:
    name, n = data.text(), data.one("I")
    if not 0 < n <= _MOST_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {n} dimensions")
    shape = data.values("Q", n)
    return name, shape[::-1], *data.values("IQ")


def _described(
    name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, alignment: int, end: int
) -> Described:
    gguf = package()
    try:
        known = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise UnsupportedModelError(
            f"tensor {name!r} is of type {kind}, which gguf does not know; install a newer gguf"
        ) from None
    columns, block_bytes = gguf.GGML_QUANT_SIZES[known]
    if 0 in shape or shape[-1] % columns:
        raise ValueError(f"tensor {name!r} of {list(shape)} is not filled by blocks of {columns}")
    tensor = Described(name, known.name, shape, shape[-1] // columns * block_bytes, start + offset)
    if offset % alignment or tensor.offset + tensor.nbytes > end:
        raise ValueError(
            f"tensor {name!r} would take {tensor.nbytes} bytes at {tensor.offset}, and the file has {end}"
        )
    return tensor
