"""Starts and ends the process from which reading workers are forked."""

import os
import socket
import subprocess
import sys
import weakref
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock
from typing import Any

from fiddler.text import reading_process as process

START_S = 120.0
"""Longest wait for the process to be ready: it takes about a second, longer on a busy machine."""


class _Process(subprocess.Popen[bytes]):
    """A process that ends with the program if it was not ended before; neither case gives a warning."""

    def __del__(self) -> None:
        return


class Server:
    """The process that workers are forked from."""

    def __init__(self) -> None:
        """Start it. Raises `OSError`."""
        self._control, theirs = socket.socketpair()
        _OPEN.add(self)
        try:
            with theirs:
                self._process = _Process(
                    [sys.executable, "-I", str(Path(process.__file__)), *_module_paths()],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,  # a terminal's ctrl-C is not for it
                    env=dict(os.environ, **_ENVIRONMENT),
                )
        except BaseException:
            self._control.close()
            raise
        self._ready = Event()
        self._ordering = Lock()
        self._end = weakref.finalize(self, _end, self._control, self._process, self._ready, os.getpid())

    def prepare(self, definition: dict[str, Any]) -> None:
        """Send the tokenizer's definition and wait until it is ready. Raises `OSError`, or `ValueError` if it
        refuses.
        """
        self._control.settimeout(START_S)
        process.send(self._control, definition)
        kind, content = frame(self._control)
        if kind != process.READY:
            raise ValueError(content.decode(errors="replace"))
        self._ready.set()

    def fork(self) -> tuple[socket.socket, int]:
        """Fork a worker; returns its socket and its process id.

        Raises `OSError`: `ConnectionError` where the process has ended.
        """
        ours, theirs = socket.socketpair()
        ours.settimeout(START_S)
        try:
            with theirs, self._ordering:
                socket.send_fds(self._control, [process.FORK], [theirs.fileno()])
            (pid,) = process.SIZE.unpack(frame(ours)[1])
        except EOFError:
            ours.close()
            raise OSError("it could not be forked") from None
        except BaseException:
            ours.close()
            raise
        return ours, pid

    @property
    def ended(self) -> bool:
        """Whether it runs no more."""
        return self._process.poll() is not None

    def kill(self, pid: int) -> None:
        """Kill a worker, if it has not ended."""
        with self._ordering, suppress(OSError):  # then it has ended, and the worker with it
            self._control.sendall(process.KILL + process.SIZE.pack(pid))

    def end(self) -> None:
        """End it and its workers, and wait for that."""
        self._end()

    def forget(self) -> None:
        """Forget the process in a forked child of the program, to which it does not belong."""
        self._end.detach()
        self._control.close()


def _end(control: socket.socket, server: _Process, ready: Event, owner: int) -> None:
    if os.getpid() != owner:
        return
    with suppress(OSError):  # it has ended
        control.shutdown(socket.SHUT_RDWR)  # seen whoever else holds it
    control.close()
    if not ready.is_set():  # then it has no workers that it would have to end
        server.kill()
    try:
        server.wait(timeout=2)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


_OPEN: "weakref.WeakSet[Server]" = weakref.WeakSet()
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",  # a process with threads cannot be forked
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RUST_BACKTRACE": "0",
}


def _forget_all() -> None:
    for server in list(_OPEN):
        server.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _module_paths() -> list[str]:
    """Return where the program finds modules, as absolute paths; a folder that is gone is left out."""
    found = []
    for path in sys.path:
        try:
            found.append(os.path.abspath(path))  # noqa: PTH100  # a path may be empty, or a zip file
        except OSError:
            continue
    return found


def frame(sock: socket.socket) -> tuple[bytes, bytes]:
    """Return the kind and the content of the next message. Raises `OSError`, and `EOFError` at the end."""
    kind, n_bytes = process.HEAD.unpack(process.receive(sock, process.HEAD.size))
    return kind, process.receive(sock, n_bytes)
