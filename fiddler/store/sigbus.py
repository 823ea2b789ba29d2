"""Survives reading a mapped file that was truncated: the reader gets zeros and a mark instead of a dead process.

Touching a page beyond the end of its file raises SIGBUS (mmap(2)), which ends the process. For guarded memory a
handler puts zeros there and marks it; readers check the mark before they use the bytes. The signal is raised by the
very instruction that reads, so the handler runs where a kernel multiplies and never inside an allocator or under a
lock; that is why it may be Python, and needs no compiler. Faults elsewhere go to the handler that was there before.
The handler is installed while something is guarded, on Linux only.
"""

import ctypes
import mmap
import platform
import sys
from threading import RLock
from typing import Any

SUPPORTED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")

_SIGBUS = 7
_SA_SIGINFO = 4
_SI_ADDR = 16
"""Where `siginfo_t` has the address of the fault, on 64-bit Linux (sigaction(2), asm-generic/siginfo.h)."""
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_ZEROS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE if SUPPORTED else 0


class _Action(ctypes.Structure):
    """`struct sigaction` of the C library (bits/sigaction.h)."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class Guarded:
    """Mapped memory of `length` bytes at `address`, guarded until `leave`."""

    def __init__(self, address: int, length: int) -> None:
        self.lost = False
        """Whether a part could not be read and is zeros now."""
        self.start = address
        self.end = address + -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
        if SUPPORTED:
            _enter(self)

    def leave(self) -> None:
        """Guard it no longer; call this before the memory is given back."""
        if SUPPORTED:
            _leave(self)

    def blank(self, address: int) -> bool:
        """Put zeros in place of the page at `address` and all pages behind it; False where it is not in here."""
        if not self.start <= address < self.end:
            return False
        page = address - address % mmap.PAGESIZE
        self.lost = True
        made: int = _libc.mmap(page, self.end - page, mmap.PROT_READ, _ZEROS, -1, 0)
        return made == page


_lock = RLock()
_guarded: tuple[Guarded, ...] = ()
_before = _Action()


def _enter(guarded: Guarded) -> None:
    global _guarded
    with _lock:
        _guarded = (*_guarded, guarded)
        found = _Action()
        _libc.sigaction(_SIGBUS, None, ctypes.byref(found))
        if found.handler != _ours.handler:
            ctypes.memmove(ctypes.byref(_before), ctypes.byref(found), ctypes.sizeof(found))
            _libc.sigaction(_SIGBUS, ctypes.byref(_ours), None)


def _leave(guarded: Guarded) -> None:
    global _guarded
    with _lock:
        _guarded = tuple(other for other in _guarded if other is not guarded)
        if not _guarded:
            _step_aside()


def _step_aside() -> None:
    """Give the signal back to its former handler, unless another one was installed since."""
    found = _Action()
    _libc.sigaction(_SIGBUS, None, ctypes.byref(found))
    if found.handler == _ours.handler:
        _libc.sigaction(_SIGBUS, ctypes.byref(_before), None)


def _on_fault(_number: int, info: int, _context: int) -> None:
    try:
        address = ctypes.c_size_t.from_address(info + _SI_ADDR).value
        if any(guarded.blank(address) for guarded in _guarded):
            return  # the instruction is run again, and reads zeros
    except BaseException:  # nobody could catch it, and to return alone would fault for ever
        pass
    _step_aside()  # the instruction faults again, and the handler from before has it


_libc: Any = ctypes.CDLL(None) if SUPPORTED else None
if SUPPORTED:
    _pointer, _size = ctypes.c_void_p, ctypes.c_size_t
    _libc.mmap.argtypes = (_pointer, _size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    _libc.mmap.restype = _pointer
    # use_errno: what was interrupted finds its own errno again.
    _callback = ctypes.CFUNCTYPE(None, ctypes.c_int, _pointer, _pointer, use_errno=True)(_on_fault)
    _ours = _Action(ctypes.cast(_callback, _pointer).value, flags=_SA_SIGINFO)
