"""The interface of a GPU: streams that keep their order, events between them, pinned memory, graphs.

This is everything that the rest of the package knows of CUDA. `gpu.cuda` implements it; the tests have a fake,
whose streams run late and in any order that the events allow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Event(Protocol):
    """A point in a stream's work."""

    def done(self) -> bool:
        """Whether the stream has passed it; never waits."""
        ...

    def wait(self) -> None:
        """Return once the stream has passed it; other threads go on meanwhile."""
        ...

    def since(self, earlier: "Event") -> float:
        """Return the seconds on the GPU between two events that are done."""
        ...


class Stream(Protocol):
    """Work that the GPU does in the order in which it was queued; the host waits for none of it."""

    def run(self, work: Callable[[], object]) -> None:
        """Queue the launches of `work`."""
        ...

    def mark(self) -> Event:
        """Return the point behind everything queued so far."""
        ...

    def follow(self, event: Event) -> None:
        """Let later work wait, on the GPU, until another stream has passed `event`."""
        ...


class Graph(Protocol):
    """Recorded launches, to be made again at once."""

    def replay(self) -> None:
        """Queue the launches on the main stream; they read and write the memory that they were recorded with."""
        ...


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of the whole GPU, in bytes; other processes' counts as taken."""

    free: int
    total: int


class Gpu(Protocol):
    """One GPU. Its methods belong to the thread that `enter` was called in, but for events, which any may ask."""

    @property
    def name(self) -> str:
        """The GPU's name, as its maker gives it."""
        ...

    @property
    def device(self) -> torch.device:
        """The GPU's device in torch."""
        ...

    @property
    def main(self) -> Stream:
        """The stream of the model's dense part and of experts in slots."""
        ...

    @property
    def link(self) -> Stream:
        """The stream of copies of experts to slots."""
        ...

    @property
    def down(self) -> Stream:
        """The stream of routing and rows to the host."""
        ...

    @property
    def up(self) -> Stream:
        """The stream of results of the host's experts."""
        ...

    def enter(self) -> None:
        """Let this thread's torch operations go to the main stream, for good."""
        ...

    def launch(self, work: Callable[[], T]) -> T:
        """Run code whose torch operations go to the main stream; returns its result, before that is computed."""
        ...

    def pin(self, memory: Tensor) -> bool:
        """Lock host memory, so that no copy from it makes the host wait; returns whether that was possible."""
        ...

    def unpin(self, memory: Tensor) -> None:
        """Unlock memory that `pin` has locked."""
        ...

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return host memory that is locked. Raises `RuntimeError` where there is none."""
        ...

    def pool(self) -> object:
        """Return a memory pool for graphs that never run concurrently."""
        ...

    def capture(self, pool: object, work: Callable[[], T]) -> tuple[Graph, T]:
        """Record the launches of `work` on the main stream, without running them; returns the result of `work`.

        Raises `RuntimeError` where it does something that cannot be recorded, such as waiting for the GPU.
        """
        ...

    def memory(self) -> Memory:
        """Return the free memory."""
        ...

    def peak(self, work: Callable[[], object]) -> int:
        """Return the most bytes that `work` takes, beside those held now."""
        ...

    def reclaim(self) -> None:
        """Give memory that nothing uses back to the GPU."""
        ...
