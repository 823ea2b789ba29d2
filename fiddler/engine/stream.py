"""What a caller holds of a request: tokens as they come, and the way to end it early."""

import weakref
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Self

from fiddler.lanes.channel import Channel
from fiddler.types import Token


class Admitted:
    """Pushed before the first token: the prompt is accepted and the request runs."""


Item = Admitted | Token | BaseException


class TokenStream:
    """The tokens of one request, in order.

    Awaiting it waits until the request is admitted, and raises what is wrong with it; iterating does both.
    Leaving an `async with` block, `aclose()`, or dropping the last reference ends the request, and frees its
    memory at the engine's next step. A cancelled wait does not end it: the next one goes on where it stopped.
    A slow reader delays nobody; what it has not read yet waits in memory.
    """

    def __init__(self, channel: Channel[Item], end: Callable[[], None]) -> None:
        self._channel = channel
        self._admitted = False
        self._ended = False
        # The engine knows the channel, not the stream: an abandoned stream is collected, and that ends the request.
        self._end = weakref.finalize(self, end)
        self._end.atexit = False

    def __await__(self) -> Generator[Any, Any, Self]:
        return self._admit().__await__()

    async def _admit(self) -> Self:
        if not self._admitted and not self._ended:
            await self._next()
            self._admitted = True
        return self

    async def _next(self) -> Admitted | Token:
        item = await self._channel.receive()
        if isinstance(item, BaseException):
            self._finish()
            raise item
        if isinstance(item, Token) and item.finish_reason is not None:
            self._finish()
        return item

    def _finish(self) -> None:
        self._ended = True
        self._end.detach()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        await self._admit()
        if self._ended:
            raise StopAsyncIteration
        token = await self._next()
        assert isinstance(token, Token)
        return token

    async def __aenter__(self) -> Self:
        return await self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the request; nothing happens if it has ended. Does not wait for the engine."""
        self._ended = True
        self._end()
