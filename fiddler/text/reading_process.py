"""The process that reads prompts: it renders chat templates and tokenises where neither can hurt the engine.

Both are code or data of the checkpoint: they can run for ever, take all memory, or abort. `text.reading_server`
runs this file as a script, with the program's module paths as its argument. It prepares once and then forks a
worker for every socket it is given. A worker answers one question after another; the kernel ends it when an answer
takes too long, and refuses it memory beyond a bound. When the sockets close, everything ends.

A question is a marshalled tuple behind its length. An answer is one frame or two: a kind, a length, and bytes.
"""

import array
import ctypes
import importlib
import importlib.util
import logging
import marshal
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

READY, UNFIT = b"y", b"n"
"""Kinds of the process itself: it can fork workers from now on, or why it never will."""
FORK, KILL = b"f", b"k"
"""Commands to the process: fork a worker for the socket beside the command, or kill the one whose id follows."""
BORN = b"b"
"""A worker's first word: its id."""
RENDERED, IDS, TOO_MANY = b"r", b"i", b"t"
"""The template is done; the token ids (uint32); how many tokens there are at least."""
NO_CHAT, NO_TEXT, NO_MEMORY = b"c", b"x", b"m"
"""The template's error; the tokenizer's error; memory ran out."""
HEAD = struct.Struct("!cQ")
SIZE = struct.Struct("!Q")
_TEMPLATES = "transformers.utils.chat_template_utils"
FIRST_CHARACTERS = 4096
"""Characters tokenised first, at least, of a text with more characters than there is room for tokens."""


def receive(sock: socket.socket, n_bytes: int) -> bytes:
    """Read exactly `n_bytes`. Raises `EOFError` where the other side is gone."""
    parts = []
    while n_bytes:
        part = sock.recv(min(n_bytes, 1 << 20))
        if not part:
            raise EOFError("the other side is gone")
        parts.append(part)
        n_bytes -= len(part)
    return b"".join(parts)


def send(sock: socket.socket, message: Any) -> None:
    """Send a message of plain values behind its length. Raises `ValueError` for a value that is not plain."""
    content = marshal.dumps(message)
    sock.sendall(SIZE.pack(len(content)) + content)


def main() -> None:
    """Prepare, say so, and fork a worker for every socket that comes, until no more can come."""
    control = socket.socket(fileno=0)
    try:
        reader = Reader(_question(control))
    except EOFError:
        return
    except BaseException as error:  # told instead of printed: nobody reads what this process prints
        _say(control, UNFIT, _reason(error))
        return
    workers: set[int] = set()
    signal.signal(signal.SIGCHLD, lambda *_: _reap(workers))
    _say(control, READY)
    while True:
        order, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if order == FORK:
            workers.add(_fork(descriptors[0], control, reader))
            os.close(descriptors[0])
            _reap(workers)  # one that ended before it was known here, and who was never born
        elif order == KILL:
            (pid,) = SIZE.unpack(receive(control, SIZE.size))
            if pid in workers:
                os.kill(pid, signal.SIGKILL)
        else:
            break
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for pid in _reap(workers):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _reap(workers: set[int]) -> set[int]:
    """Let go of the workers that have ended; return the others."""
    workers.discard(0)
    for pid in tuple(workers):
        try:
            ended = os.waitpid(pid, os.WNOHANG)[0]
        except ChildProcessError:  # reaped by the signal's handler meanwhile
            ended = pid
        if ended:
            workers.discard(pid)
    return workers


def _fork(descriptor: int, control: socket.socket, reader: "Reader") -> int:
    """Start a worker and return its id; 0 where none can be, and its socket then closes without an answer."""
    try:
        pid = os.fork()
    except OSError:
        return 0
    if pid == 0:
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _die_with_parent()
            control.close()
            _work(socket.socket(fileno=descriptor), reader)
        finally:
            os._exit(0)
    return pid


def _work(sock: socket.socket, reader: "Reader") -> None:
    """Run a worker: answer until no question comes. It reports running out of memory, and ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    held = _memory()
    _say(sock, BORN, SIZE.pack(os.getpid()))
    while True:
        memory, *question = _question(sock)
        _bound(held + memory)
        try:
            kind, content = reader.answer(sock, *question)
        except MemoryError:
            kind, content = NO_MEMORY, b""
        _bound(None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _say(sock, kind, content)
        if kind == NO_MEMORY:
            return


def _memory() -> int:
    """Return the bytes of address space that this process has now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux: a loose bound
        return 1 << 30


def _bound(n_bytes: int | None) -> None:
    """Keep this process's address space within `n_bytes`; `None` lifts the bound."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = hard if n_bytes is None else n_bytes
    resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


class Reader:
    """A tokenizer and a chat template, ready to be used."""

    def __init__(self, definition: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(definition["tokenizer"])
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = definition["split_special_tokens"]
        self._template = definition["template"]
        self._names = definition["special_tokens"]
        self._templates = _transformers_templates() if self._template is not None else None

    def answer(
        self, sock: socket.socket, said: Any, special: bool, n_most: int | None, limit_s: float, character_s: float
    ) -> tuple[bytes, bytes]:
        """Return the answer to a question: text, or messages, with at most `n_most` tokens.

        Nobody handles the timer's signal: the kernel ends the worker that has not answered in time.
        """
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        if not isinstance(said, str):
            try:
                said = self._render(said)
            except MemoryError:
                raise
            except BaseException as error:  # templates raise what they like
                return NO_CHAT, _reason(error)
            _say(sock, RENDERED)
        signal.setitimer(signal.ITIMER_REAL, limit_s + character_s * len(said))
        try:
            ids, whole = self._encode(said, special, n_most)
        except MemoryError:
            raise
        except BaseException as error:  # a panic of the tokenizer's is no `Exception`
            return NO_TEXT, _reason(error)
        return (IDS, array.array("I", ids).tobytes()) if whole else (TOO_MANY, str(len(ids)).encode())

    def _render(self, messages: list[dict[str, Any]]) -> str:
        assert self._templates is not None
        rendered, _ = self._templates.render_jinja_template(
            [messages], chat_template=self._template, add_generation_prompt=True, **self._names
        )
        return str(rendered[0])

    def _encode(self, text: str, special: bool, n_most: int | None) -> tuple[Sequence[int], bool]:
        """Return a text's token ids and `True`; or those of its beginning, where they are surely too many already.

        A tokenizer decides locally: cutting a text changes a few tokens around the cut. So if its beginning has a
        quarter and 64 more tokens than there is room for, the whole text has too many.
        """
        n_read = len(text) if n_most is None else max(FIRST_CHARACTERS, n_most)
        while n_read < len(text):
            ids = self._tokenizer.encode(text[:n_read], add_special_tokens=special).ids
            if n_most is not None and len(ids) > n_most + n_most // 4 + 64:
                return ids, False
            n_read *= 2
        return self._tokenizer.encode(text, add_special_tokens=special).ids, True


def _question(sock: socket.socket) -> Any:
    return marshal.loads(receive(sock, *SIZE.unpack(receive(sock, SIZE.size))))


def _say(sock: socket.socket, kind: bytes, content: bytes = b"") -> None:
    sock.sendall(HEAD.pack(kind, len(content)) + content)


def _reason(error: BaseException) -> bytes:
    return (str(error) or type(error).__name__)[:1000].encode(errors="replace")


def _transformers_templates() -> Any:
    """Import transformers' module of chat templates without its other imports, which take five times as long.

    Of those it needs only the check for jinja2, a logger, and numpy for values that no message here has.
    """
    found = importlib.util.find_spec("transformers")
    folder = Path(found.origin).parent if found is not None and found.origin is not None else Path()
    _stand_in("transformers", __path__=[str(folder)])
    _stand_in("transformers.utils", __path__=[str(folder / "utils")])
    _stand_in("transformers.utils.logging", get_logger=logging.getLogger)
    _stand_in(
        "transformers.utils.import_utils",
        is_jinja_available=lambda: importlib.util.find_spec("jinja2") is not None,
        is_torch_available=lambda: False,
        is_vision_available=lambda: False,
    )
    _import_late("numpy")
    try:
        return importlib.import_module(_TEMPLATES)
    except Exception:  # a version that needs more
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        return importlib.import_module(_TEMPLATES)


def _stand_in(name: str, **content: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module


def _import_late(name: str) -> None:
    """Have a module loaded when something of it is first used."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.loader is not None:
        spec.loader = importlib.util.LazyLoader(spec.loader)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends for any reason."""
    set_death_signal = 1
    try:
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    except (OSError, AttributeError):  # another system: the closed socket ends this process
        return


if __name__ == "__main__":
    sys.path[:] = sys.argv[1:]
    try:
        main()
    finally:
        os._exit(0)  # without the interpreter's own tidying, which whoever closes an engine would wait for
