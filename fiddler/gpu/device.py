"""What is asked of a GPU: streams that keep their order, events between them, pinned memory, graphs.

Everything that the rest of the package knows of CUDA is here; `devices.cuda` is the one that has it, and the tests
have another, whose streams run late and in any order that the events allow.
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
        """Queue what `work` launches."""
        ...

    def mark(self) -> Event:
        """Return the point behind what is queued now."""
        ...

    def follow(self, event: Event) -> None:
        """Let what is queued from now on wait, on the GPU, until another stream has passed `event`."""
        ...


class Graph(Protocol):
    """Launches that were recorded, to be made again at once."""

    def replay(self) -> None:
        """Queue them on the main stream; they read and write the memory that they were recorded with."""
        ...


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the whole GPU, in bytes: other processes' is taken too."""

    free: int
    total: int


class Gpu(Protocol):
    """One GPU. Its methods belong to the thread that `enter` was called in, but for events, which any may ask."""

    @property
    def name(self) -> str:
        """What its maker calls it."""
        ...

    @property
    def device(self) -> torch.device:
        """What torch calls it."""
        ...

    @property
    def main(self) -> Stream:
        """The model's dense part and the experts in slots."""
        ...

    @property
    def link(self) -> Stream:
        """Experts to their slots."""
        ...

    @property
    def down(self) -> Stream:
        """Routing and rows to the host."""
        ...

    @property
    def up(self) -> Stream:
        """Results of the host's experts."""
        ...

    def enter(self) -> None:
        """Let this thread's torch operations go to the main stream, for good."""
        ...

    def launch(self, work: Callable[[], T]) -> T:
        """Run code whose torch operations go to the main stream; returns what it returns, before it is computed."""
        ...

    def pin(self, memory: Tensor) -> bool:
        """Lock host memory into RAM, so that no copy from it makes the host wait; whether that was possible."""
        ...

    def unpin(self, memory: Tensor) -> None:
        """Unlock what `pin` has locked."""
        ...

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return host memory that is locked. Raises `RuntimeError` where there is none."""
        ...

    def pool(self) -> object:
        """Return a name for memory that graphs which never run at the same time share."""
        ...

    def capture(self, pool: object, work: Callable[[], T]) -> tuple[Graph, T]:
        """Record what `work` launches on the main stream, without running it; returns what it returned.

        Raises `RuntimeError` where it does what cannot be recorded, such as waiting for the GPU.
        """
        ...

    def memory(self) -> Memory:
        """Return what is free now."""
        ...

    def peak(self, work: Callable[[], object]) -> int:
        """Return how many bytes `work` takes at most, beside what is held now."""
        ...

    def reclaim(self) -> None:
        """Give memory that nothing uses back to the GPU."""
        ...
