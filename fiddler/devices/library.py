"""Compiles a library, keeps it on disk, and loads it only if we wrote it ourselves.

Other users may own the cache folder or one above it, and change the target of a path between a check and a load. So
folder and file are checked once they are open, the bytes are compared with the digest at their end, and these bytes
are loaded, not the path.

A compiler may be missing, fail, hang, or print anything; its whole process group is ended after a time limit.
"""

import atexit
import ctypes
import hashlib
import logging
import os
import select
import signal
import stat
import subprocess
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory, gettempdir
from time import monotonic

MOST_BYTES = 1 << 26
"""Files larger than this are not ours."""
_DIGEST_BYTES = hashlib.sha256().digest_size
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def kept(file: Path) -> bytes:
    """Return a library that `keep` wrote. Raises `OSError` for one that is absent, damaged or open to others."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe of that name is not waited for
    with _folder(file.parent, mend=False) as folder, _opened(file.name, flags, folder) as descriptor:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or not _ours_alone(found) or found.st_size > MOST_BYTES:
            raise PermissionError(f"{file} is no file that only this user writes")
        with os.fdopen(descriptor, "rb", closefd=False) as opened:
            content = opened.read(MOST_BYTES)
    made, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(made).digest() != digest:
        raise OSError(f"{file} is damaged")
    return made


def keep(file: Path, made: bytes) -> None:
    """Write a library, with its digest behind it; whole or not at all, for other processes may be doing the same.

    Raises `OSError` where it cannot be written, or where others could write it too.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = f"{file.stem}-{token_hex(8)}.partial"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with _folder(file.parent, mend=True) as folder, _opened(partial, flags, folder) as descriptor:
        try:
            with os.fdopen(descriptor, "wb", closefd=False) as opened:
                opened.write(made + hashlib.sha256(made).digest())
            os.replace(partial, file.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.unlink(partial, dir_fd=folder)
            raise


def loaded(made: bytes) -> ctypes.CDLL:
    """Load a library from its bytes. Raises `OSError` if they are no library.

    From memory, where the system allows that: no path leads there that others could change. The descriptor stays
    open, for the loader knows a library by its path, and this one must not come to mean another.
    """
    with suppress(AttributeError, OSError):
        descriptor = os.memfd_create("fiddler")
        try:
            with os.fdopen(descriptor, "wb", closefd=False) as opened:
                opened.write(made)
            return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
        except OSError:
            os.close(descriptor)
            raise
    with private_room() as room:  # what is loaded stays when its file goes
        file = room / "made.so"
        file.write_bytes(made)
        return ctypes.CDLL(str(file))


@contextmanager
def private_room() -> Generator[Path]:
    """Give a temporary folder that others can neither write nor replace. Raises `OSError` where there is none."""
    for parent in (Path(place).resolve() for place in (gettempdir(), "/tmp", "/var/tmp")):
        if parent.is_dir() and _stays(parent):
            with TemporaryDirectory(prefix="fiddler-", dir=parent, ignore_cleanup_errors=True) as room:
                yield Path(room)
            return
    raise PermissionError("there is no folder for temporary files that only this user could change")


def _stays(folder: Path) -> bool:
    """Whether only the system could replace our folder inside this one.

    The owner of the root folder counts as the system; in a container that may be an unknown user.
    """
    system = {0, os.geteuid(), Path("/").stat().st_uid}
    every = [place.lstat() for place in (folder, *folder.parents)]
    return all(f.st_uid in system and (not f.st_mode & _OTHERS_WRITE or f.st_mode & stat.S_ISVTX) for f in every)


@contextmanager
def _folder(folder: Path, *, mend: bool) -> Generator[int]:
    """Open a folder that only we can write; `mend` makes one that is ours so. Raises `OSError` for any other.

    A link is followed, but its target is not mended: others may have placed the link.
    """
    linked = folder.is_symlink()
    with _opened(folder, os.O_RDONLY | os.O_DIRECTORY | (0 if linked else os.O_NOFOLLOW)) as descriptor:
        found = os.fstat(descriptor)
        if mend and not linked and found.st_uid == os.geteuid() and found.st_mode & _OTHERS_WRITE:
            os.fchmod(descriptor, 0o700)
            found = os.fstat(descriptor)
        if not _ours_alone(found):
            raise PermissionError(f"others may write {folder}")
        yield descriptor


@contextmanager
def _opened(path: str | Path, flags: int, folder: int | None = None) -> Generator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _ours_alone(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE


VERSION_S = 8.0
"""Seconds that a compiler has to answer `--version`."""
COMPILE_S = 90.0
"""Seconds for compiling, which takes one second on an idle machine."""
PATIENCE_S = 5.0
"""Seconds after which the log names the compiler that is awaited."""
MOST_SAID_BYTES = 1 << 16
"""Bytes of its output that are kept, the last ones."""
MOST_QUOTED = 200
"""Characters of a line of it that an error repeats."""

logger = logging.getLogger("fiddler")

_running: set[int] = set()
"""Process groups of compilers that were started and have not ended."""


def compiled(compiler: Sequence[str], source: Path, flags: Sequence[str]) -> bytes:
    """Return the library that a compiler makes of a source file. Raises as `run` does."""
    with private_room() as room:
        made = room / "made.so"
        run([*compiler, *flags, str(source), "-o", str(made), "-lm"], COMPILE_S, TMPDIR=str(room))
        if not made.is_file():  # reading a pipe would not end
            raise OSError("it made no library")
        return made.read_bytes()


def run(command: Sequence[str], limit_s: float, **environment: str) -> bytes:
    """Return a compiler's output, in English. After `limit_s` seconds it is ended, with all that it started.

    Raises `OSError` where it cannot be started, `subprocess.SubprocessError` where it fails or takes too long.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group of its own, which can be ended whole
        env=os.environ | {"LC_ALL": "C"} | environment,
    )
    _running.add(process.pid)
    try:
        deadline = monotonic() + limit_s
        said = _read(process, deadline, f"{command[0]!r} has not ended; it is given {limit_s:g} s")
        code = process.wait(max(deadline - monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        raise subprocess.SubprocessError(f"it took more than {limit_s:g} s") from None
    finally:
        ended = process.poll() is not None
        _end(process.pid)  # one that has ended may have left others running
        if not ended:
            with suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk cannot be ended
                process.wait(1.0)
        _running.discard(process.pid)
        assert process.stdout is not None
        process.stdout.close()
    if code:
        lines = said.decode(errors="replace").strip().split("\n")
        told = next((line for line in lines if "error:" in line), lines[-1])  # what follows an error is of less use
        raise subprocess.SubprocessError(f"it ended with code {code}, and said {told[:MOST_QUOTED]!r}")
    return said


def _read(process: "subprocess.Popen[bytes]", deadline: float, waiting: str) -> bytes:
    """Return a process's output, at most `MOST_SAID_BYTES`, until it closes it or time is up.

    Not `communicate`, which waits for every process that holds the output, even one that cannot be ended.
    """
    assert process.stdout is not None
    source, said, told = process.stdout.fileno(), b"", False
    poll = select.poll()
    poll.register(source, select.POLLIN)
    while (left_s := deadline - monotonic()) > 0:
        if poll.poll(1e3 * min(left_s, PATIENCE_S)):
            read = os.read(source, MOST_SAID_BYTES)
            if not read:
                break
            said = (said + read)[-MOST_SAID_BYTES:]
        elif not told:
            told = True
            logger.warning("waiting for the C compiler: %s", waiting)
    return said


def end_all() -> None:
    """End the compilers that run; for a process that is about to end."""
    for group in tuple(_running):
        _end(group)


def _end(group: int) -> None:
    with suppress(OSError):
        os.killpg(group, signal.SIGKILL)


atexit.register(end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_running.clear)  # they are the parent's
