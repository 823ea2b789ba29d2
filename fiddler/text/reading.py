"""Asks a process beside the program to read prompts; a reading can be given up at any time.

A thread could not be ended, nor kept from taking the interpreter's lock, and a tokenizer that runs out of memory
aborts its process. One process prepares itself; workers are forked from it in a few milliseconds, and kept.
"""

import socket
import weakref
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Lock
from time import monotonic
from typing import Any

from fiddler.errors import EngineClosedError, EngineFailedError, FiddlerError, PromptError
from fiddler.text import reading_process as process
from fiddler.text.reading_server import START_S, Server, frame

LIMIT_S = 5.0
"""Longest that a template may take; the tokenizer has as long, and more for a long text."""
CHARACTER_S = 20e-6
"""Seconds added to the limit per character of text: ten times the time of a slow tokenizer."""
BYTES = 256 << 20
"""Bytes of memory that reading a prompt may take."""
BYTES_PER_TOKEN = 2048
"""Memory added to it for every token there is room for, which takes about 300 bytes."""

_MOST_IDLE = 4
"""Workers kept for the next questions."""
_MOST_ORPHANED = 3
"""Times that a question is asked again while something outside ends the process."""


@dataclass(frozen=True, slots=True)
class TooMany:
    """A prompt has more tokens than there is room for."""

    n_tokens: int
    counted: bool
    """Whether these are all, and not those of the text's beginning."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to be read."""

    said: str | list[dict[str, Any]]
    """Text, or messages for the chat template."""
    special: bool
    """Whether the tokenizer adds special tokens of its own."""
    n_most: int | None
    """Tokens there is room for; `None` counts them all."""


class Asking:
    """One question on its way, which another thread may give up."""

    def __init__(self) -> None:
        self.began_s: float | None = None
        """When a worker took it up, by the monotonic clock."""
        self.given_up = False
        self._worker: _Worker | None = None
        self._lock = Lock()

    def give_up(self) -> None:
        """Stop waiting: `ask` then raises `EngineClosedError`. The worker is let go."""
        with self._lock:
            self.given_up = True
            if self._worker is not None:
                self._worker.interrupt()

    def take(self, worker: "_Worker | None") -> None:
        """Note the worker that is asked, or none any more. Raises `EngineClosedError` where it was given up."""
        with self._lock:
            if self.given_up and worker is not None:
                raise EngineClosedError("the request was given up")
            self._worker = worker
            self.began_s = self.began_s or monotonic()


class Reader:
    """Answers questions about prompts: any thread may ask, and waits for the answer.

    `define` describes the tokenizer and the template in plain values. The process starts with the first question,
    and starts again if it was ended from outside.
    """

    def __init__(self, define: Callable[[], dict[str, Any]]) -> None:
        self._define = define
        self._starting = Lock()
        self._lock = Lock()  # of what follows
        self._closed = Event()
        self._server: Server | None = None
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()

    def start(self) -> None:
        """Start the process and wait until it is ready. Raises `EngineFailedError`, and `EngineClosedError`."""
        self._keep(self._worker())

    def ask(self, question: Question, asking: Asking | None = None) -> list[int] | TooMany:
        """Return a prompt's token ids, or `TooMany` if there is no room for them.

        Raises `PromptError` for errors of the template or the tokenizer, or where they exceed their bounds,
        `EngineFailedError` where no process can be had, and `EngineClosedError` when given up or closed.
        """
        asking = asking if asking is not None else Asking()
        n_orphaned = 0
        while True:
            worker = self._worker()
            try:
                asking.take(worker)
                answer = worker.ask(question)
            except _EndedError as ended:
                if self._closed.is_set() or asking.given_up:
                    raise EngineClosedError("the engine was closed while the prompt was read") from None
                if ended.unheard and worker.n_answers:
                    continue  # it had ended before it was asked
                if worker.orphaned:  # and that ended it: no fault of the prompt's
                    n_orphaned += 1
                    if n_orphaned == _MOST_ORPHANED:
                        raise EngineFailedError("the process that reads prompts was ended from outside") from None
                    continue
                raise ended.error() from None
            finally:
                asking.take(None)
                self._keep(worker)
            if isinstance(answer, FiddlerError):
                raise answer
            return answer

    def close(self) -> None:
        """End the process: waiting and later calls of `ask` raise `EngineClosedError`."""
        with self._lock:
            self._closed.set()
            server, self._server = self._server, None
            for worker in self._busy:
                worker.interrupt()
            for worker in self._idle:
                worker.close()
            self._idle.clear()
        if server is not None:
            server.end()

    def _worker(self) -> "_Worker":
        """Take a worker that is idle, or have one made."""
        with self._lock:
            if self._closed.is_set():
                raise EngineClosedError("the engine is closed")
            if self._idle:
                worker = self._idle.pop()
                self._busy.add(worker)
                return worker
        try:
            with self._starting:
                worker = self._new_worker()
        except (OSError, ValueError, EOFError) as error:
            if self._closed.is_set():
                raise EngineClosedError("the engine is closed") from None
            raise EngineFailedError(f"the process that reads prompts cannot be started: {error}") from error
        with self._lock:
            self._busy.add(worker)
            if self._closed.is_set():
                worker.interrupt()
        return worker

    def _new_worker(self) -> "_Worker":
        server = self._server
        if server is not None:
            try:
                return _Worker(server)
            except ConnectionError:  # ended from outside, as by a system that is out of memory
                with self._lock:
                    self._server = None
                server.end()
        server = Server()
        with self._lock:
            if self._closed.is_set():
                server.end()
                raise EngineClosedError("the engine is closed")
            self._server = server
        try:
            server.prepare(self._define())
            return _Worker(server)
        except BaseException:
            with self._lock:
                self._server = None
            server.end()
            raise

    def _keep(self, worker: "_Worker") -> None:
        """Put a worker back; one that has ended is let go."""
        with self._lock:
            self._busy.discard(worker)
            if worker.alive and not self._closed.is_set() and len(self._idle) < _MOST_IDLE:
                self._idle.append(worker)
            else:
                worker.close()


class _EndedError(Exception):
    """A worker ended instead of answering."""

    def __init__(self, question: Question, *, rendered: bool, in_time: bool, unheard: bool) -> None:
        self.unheard = unheard
        self._who = "the tokenizer" if rendered or isinstance(question.said, str) else "the chat template"
        self._in_time = in_time

    def error(self) -> PromptError:
        """Return the error for the prompt's owner."""
        if self._in_time:
            return PromptError(f"{self._who} crashed on this prompt")
        return PromptError(f"{self._who} took too long on this prompt: more than {LIMIT_S:g} s")


class _Worker:
    """One worker's socket; one question at a time."""

    def __init__(self, server: Server) -> None:
        """Fork it. Raises `OSError`: `ConnectionError` where the server has ended."""
        self._socket, self._pid = server.fork()
        self._server = server
        weakref.finalize(self, self._socket.close)  # one that is not closed by name goes without a warning
        self.alive = True
        self.n_answers = 0

    def ask(self, question: Question) -> list[int] | TooMany | FiddlerError:
        """Return the answer. Raises `_EndedError`, and `PromptError` for messages that are no plain values."""
        started_s = monotonic()
        text = question.said if isinstance(question.said, str) else ""
        n_room = question.n_most if question.n_most is not None else len(text)
        memory = BYTES + BYTES_PER_TOKEN * n_room
        # The worker's own timer ends it; this one is for a machine that does not let it.
        self._socket.settimeout(START_S + 2 * (LIMIT_S + CHARACTER_S * len(text)))
        kind, content, rendered = b"", b"", False
        try:
            process.send(
                self._socket,
                (memory, question.said, question.special, question.n_most, LIMIT_S, CHARACTER_S),
            )
            kind, content = frame(self._socket)
            if kind == process.RENDERED:
                rendered = True
                kind, content = frame(self._socket)
        except (OSError, EOFError):
            self.alive = False
            took_s = monotonic() - started_s
            in_time = took_s < LIMIT_S
            raise _EndedError(
                question, rendered=rendered, in_time=in_time, unheard=took_s < 1 and in_time
            ) from None
        except ValueError as error:
            raise PromptError(f"messages are made of text, numbers, lists and mappings: {error}") from error
        self.n_answers += 1
        self.alive = kind != process.NO_MEMORY
        return _answer(kind, content, memory)

    @property
    def orphaned(self) -> bool:
        """Whether the process it was forked from has ended, and the worker with it."""
        return self._server.ended

    def interrupt(self) -> None:
        """Make a waiting `ask` see the end, and end the worker."""
        self.alive = False
        self._server.kill(self._pid)
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # closed, or the other side is gone
            return

    def close(self) -> None:
        """Let the worker go: it ends by itself."""
        self._socket.close()


def _answer(kind: bytes, content: bytes, memory: int) -> list[int] | TooMany | FiddlerError:
    if kind == process.IDS:
        return array("I", content).tolist()
    if kind == process.TOO_MANY:
        return TooMany(int(content), counted=False)
    if kind == process.NO_MEMORY:
        return PromptError(f"the chat template or the tokenizer takes more than {memory >> 20} MB for this prompt")
    refused = (
        "the chat template refused the messages" if kind == process.NO_CHAT else "the tokenizer refused the text"
    )
    return PromptError(f"{refused}: {content.decode(errors='replace')}")
