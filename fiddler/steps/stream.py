"""`TokenStream`: a request's tokens as they come, and the way to end it early."""

import os
import weakref
from collections.abc import Callable, Generator
from copy import copy
from types import TracebackType
from typing import Any, Self

from fiddler.errors import EngineClosedError, FiddlerError
from fiddler.lanes.queues import Channel
from fiddler.types import Token


class Admitted:
    """Pushed before the first token: the prompt is accepted and the request runs."""


class Left:
    """Pushed by `TokenStream.aclose`, for a task that waits on the stream: nothing else may come."""


Item = Admitted | Token | FiddlerError | Left


class TokenStream:
    """The tokens of one request, in order.

    Awaiting it waits until the request is admitted, or raises the request's error; iterating does both. A stream
    that ended with an error raises it again each time.

    Leaving an `async with` block, `aclose()`, or dropping the last reference ends the request, and frees its memory
    at the engine's next step. From `aclose()` on the stream gives no token: iterating ends, also in a task that
    waits for the next token just then, and awaiting raises `EngineClosedError` if the request had not been
    admitted. A cancelled wait does not end the request: the next wait goes on where that one stopped. A slow reader
    delays no other; its unread tokens wait in memory. One task waits at a time, in any thread and event loop; a
    second one raises `anyio.BusyResourceError`.

    The engine stays open while a stream of it that has not ended is held. In a forked child the streams of its
    parent raise `EngineClosedError`.
    """

    def __init__(self, channel: Channel[Item], end: Callable[[], None], engine: object = None) -> None:
        self._channel = channel
        self._engine: object = engine  # an engine is closed once nobody holds it
        self._pid = os.getpid()
        self._admitted = False
        self._finished = False
        self._left = False
        self._error: FiddlerError | None = None
        # The engine knows the channel, not the stream: an abandoned stream is collected, and that ends the request.
        self._end = weakref.finalize(self, end)
        self._end.atexit = False

    def __await__(self) -> Generator[Any, Any, Self]:
        return self._admit().__await__()

    async def _admit(self) -> Self:
        while not self._admitted:
            if self._left:
                raise EngineClosedError("the stream was closed before its request was admitted")
            await self._next()
        self._raise_again()
        return self

    async def _next(self) -> Token | None:
        """Wait for the next token; `None` for another item. Raises the error that ended the request."""
        self._raise_again()
        item = await self._channel.receive()
        match item:
            case Admitted():
                self._admitted = True
            case Token():
                if item.finish_reason is not None:
                    self._finish()
                return item
            case FiddlerError():
                self._error = item
                self._finish()
                self._raise_again()
        return None

    def _raise_again(self) -> None:
        if os.getpid() != self._pid:
            raise EngineClosedError("the stream belongs to the process that forked this one; open an engine here")
        if self._error is not None:
            # Of one error that is raised again and again the traceback would grow, and hold every reader's frames.
            raise copy(self._error) from self._error.__cause__

    def _finish(self) -> None:
        self._finished = True
        self._engine = None
        self._end.detach()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        while not self._left:
            if self._finished and self._error is None:
                break
            token = await self._next()
            if token is not None and not self._left:
                return token
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return await self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the request, and wake a task that waits on the stream; nothing happens if it has ended.

        Does not wait for the engine.
        """
        if self._finished or self._left or os.getpid() != self._pid:
            return
        self._left = True
        self._engine = None
        self._end()
        self._channel.push(Left())
