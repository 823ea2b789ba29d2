"""Maps a file into memory: shared and read-only, without a descriptor, and watched for changes.

Shared and read-only mapping allows files larger than memory: a private writable mapping, torch's and safetensors'
own, is refused by Linux's overcommit accounting. Python's `mmap` would keep a descriptor per file.
"""

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from fiddler.errors import CheckpointError
from fiddler.store.sigbus import Guarded


class _Stamp(NamedTuple):
    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> "_Stamp":
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class Mapping:
    """A file, open in `stream`, mapped whole. The memory stays while a tensor over it is alive.

    Raises `OSError` where it cannot be mapped.
    """

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file = file
        self._real = file.resolve()  # in the hub's cache names are links, and a program may change its folder
        self._stamp = _Stamp.of(os.fstat(stream.fileno()))
        self._change: str | None = None
        buffer = _map(stream.fileno(), self._stamp.size)
        self.bytes: Tensor = torch.frombuffer(buffer, dtype=torch.uint8)
        """All bytes of the file; writing to them ends the process."""
        self._guarded = Guarded(self.bytes.data_ptr(), self._stamp.size)
        if _POSIX:
            finalize(buffer, _unmap, self.bytes.data_ptr(), self._stamp.size, self._guarded).atexit = False

    def release(self, offset: int, nbytes: int) -> None:
        """Give back the memory of the pages around some bytes; a later read gets them from the file again."""
        if not _POSIX:  # elsewhere they go when others need the memory
            return
        # Outward to whole pages, into the neighbours: nothing is lost, since the mapping is read-only.
        start = offset - offset % mmap.PAGESIZE
        _libc.madvise(self.bytes.data_ptr() + start, offset + nbytes - start, mmap.MADV_DONTNEED)

    def check(self) -> None:
        """Raise `CheckpointError` if the file has changed since it was mapped, or a part of it could not be read.

        A change shows in the file's size or time of last write, looked up under its name or, on Linux, under the
        name it was moved to. A file that is replaced or deleted under its name stays unchanged in here. Takes a
        stat.
        """
        if self._change is None:
            self._change = self._found_change()
        if self._change is not None:
            raise CheckpointError(
                f"{self.file} {self._change} while it was open; open the model again once the file is whole"
            )

    def in_place(self) -> bool:
        """Whether the file under the name has the same size and time; some systems make up inode numbers."""
        try:
            return _Stamp.of(self.file.stat())[2:] == self._stamp[2:]
        except OSError:
            return False

    def _found_change(self) -> str | None:
        if self._guarded.lost:
            return "was truncated or became unreadable"
        now = self._stamp_at(self._real) or self._stamp_at(self._moved_to())
        return None if now in (None, self._stamp) else "was changed"

    def _stamp_at(self, path: Path) -> _Stamp | None:
        """Return the file's stamp, `None` where it does not lie at `path`."""
        try:
            found = _Stamp.of(path.stat())
        except OSError:
            return None
        return found if found[:2] == self._stamp[:2] else None

    def _moved_to(self) -> Path:
        """Return the mapped file's present path, as the system knows it; nothing for one that is deleted."""
        try:
            return Path(f"/proc/self/map_files/{self._guarded.start:x}-{self._guarded.end:x}").readlink()
        except OSError:
            return self._real


_POSIX = os.name == "posix"
_FAILED = ctypes.c_void_p(-1).value


def _map(descriptor: int, size: int) -> Any:
    """Return a buffer over a file; the descriptor is not needed any more."""
    if not _POSIX:
        # By its address: torch warns of a buffer that it may not write, and all threads share one list of filters.
        array = np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        buffer: Any = (ctypes.c_uint8 * size).from_address(array.ctypes.data)
        buffer.mapped = array
        return buffer
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot be mapped: {os.strerror(number)}")
    return (ctypes.c_uint8 * size).from_address(address)


def _unmap(address: int, size: int, guarded: Guarded) -> None:
    guarded.leave()
    _libc.munmap(address, size)


_libc: Any = ctypes.CDLL(None, use_errno=True) if _POSIX else None
if _POSIX:
    _pointer, _size = ctypes.c_void_p, ctypes.c_size_t
    _libc.mmap.argtypes = (_pointer, _size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    _libc.mmap.restype = _pointer
    _libc.munmap.argtypes = (_pointer, _size)
    _libc.madvise.argtypes = (_pointer, _size, ctypes.c_int)
