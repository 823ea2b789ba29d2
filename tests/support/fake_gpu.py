"""A GPU of main memory whose streams run late: nothing runs before it must, and then in an order drawn at random.

What is only ordered by luck on a real GPU comes out wrong here. Queued work runs when the main stream needs it, or
a little at a time whenever an event is asked for. A capture notes every torch operation; a replay makes them again
into the same memory, so what was a number of the host's at capture stays what it was.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fiddler.gpu.device import Event, Memory

T = TypeVar("T")
TICK_S = 1e-6
"""Each piece of work takes this long on the fake's own clock."""


@dataclass(eq=False)
class FakeEvent:
    stream: "FakeStream"
    passed: bool = False
    at: int = 0

    def done(self) -> bool:
        if not self.passed:
            self.stream.gpu.stir()
        return self.passed

    def wait(self) -> None:
        gpu = self.stream.gpu
        for _ in range(8):
            if self.done():
                return
        with gpu.lock:
            self.stream.finish(self)

    def since(self, earlier: Event) -> float:
        assert isinstance(earlier, FakeEvent)
        assert earlier.passed, "an event was read that is not done"
        assert self.passed, "an event was read that is not done"
        return (self.at - earlier.at) * TICK_S


@dataclass(eq=False)
class FakeStream:
    """`queue` holds work to run, events to pass, and, as pairs, events to wait for."""

    gpu: "FakeGpu"
    queue: deque[Any] = field(default_factory=deque)

    def run(self, work: Callable[[], object]) -> None:
        with self.gpu.lock:
            self.queue.append(work)

    def mark(self) -> FakeEvent:
        event = FakeEvent(self)
        with self.gpu.lock:
            self.queue.append(event)
        return event

    def follow(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        with self.gpu.lock:
            self.queue.append((event,))

    def step(self) -> bool:
        """Do the oldest thing, if there is one and it need not wait."""
        if not self.queue or (isinstance(self.queue[0], tuple) and not self.queue[0][0].passed):
            return False
        head = self.queue.popleft()
        self.gpu.now += 1
        if isinstance(head, FakeEvent):
            head.passed, head.at = True, self.gpu.now
        elif not isinstance(head, tuple):
            with torch.inference_mode():
                head()
        return True

    def finish(self, until: FakeEvent | None = None) -> None:
        """Run everything, and first whatever it waits for; or up to an event."""
        while self.queue if until is None else not until.passed:
            if not self.step():
                waited = self.queue[0][0]
                waited.stream.finish(waited)


class FakeGpu:
    """`seed` draws the order; `pinnable` bytes can be locked; `total` is a number that is reported."""

    name = "a fake GPU"
    device = torch.device("cpu")

    def __init__(self, seed: int = 0, *, pinnable: float = float("inf"), total: int = 1 << 40) -> None:
        self.lock = RLock()
        self.now = 0
        self.main, self.link, self.down, self.up = (FakeStream(self) for _ in range(4))
        self.n_graphs = 0
        self.total = total
        self.workspace = 1 << 20
        self._random = Random(seed)
        self._pinnable = pinnable

    def enter(self) -> None:
        pass

    def launch(self, work: Callable[[], T]) -> T:
        """Run at once what a real GPU would queue: all that is before it on the main stream has to run first."""
        with self.lock:
            self.main.finish()
        return work()

    def pin(self, memory: Tensor) -> bool:
        if self._pinnable < memory.nbytes:
            return False
        self._pinnable -= memory.nbytes
        return True

    def unpin(self, memory: Tensor) -> None:
        self._pinnable += memory.nbytes

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Full of what must not be used."""
        memory = torch.empty(shape, dtype=dtype)
        return memory.fill_(float("nan") if dtype.is_floating_point else -77 if dtype != torch.uint8 else 77)

    def pool(self) -> object:
        return object()

    def capture(self, pool: object, work: Callable[[], T]) -> tuple["FakeGraph", T]:
        with self.lock:
            self.main.finish()
        recorder = _Recorder()
        try:
            with recorder:
                result = work()
        finally:
            recorder.undo()
        self.n_graphs += 1
        return FakeGraph(self, recorder.calls), result

    def memory(self) -> Memory:
        return Memory(self.total, self.total)

    def peak(self, work: Callable[[], object]) -> int:
        work()
        return self.workspace

    def reclaim(self) -> None:
        pass

    def stir(self) -> None:
        """Let streams drawn at random do a little."""
        with self.lock:
            for _ in range(self._random.randrange(4)):
                self._random.choice((self.main, self.link, self.down, self.up)).step()


@dataclass
class FakeGraph:
    gpu: FakeGpu
    calls: list[Any]

    def replay(self) -> None:
        self.gpu.main.run(self._run)

    def _run(self) -> None:
        for operation, args, kwargs, outputs in self.calls:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


_WAITING = frozenset(
    ("item", "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "argwhere", "masked_select", "lift_fresh")
)
"""Operations that wait for the GPU, or copy from memory that is not pinned: a real capture refuses them."""


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    """Whether an operation waits: by its name, or because its result's size hangs on numbers of the GPU's."""
    if name == "index":
        return any(isinstance(one, Tensor) and one.dtype == torch.bool for one in tree_leaves(args[1]))
    if name == "repeat_interleave":
        return len(args) > 1 and isinstance(args[1], Tensor) and kwargs.get("output_size") is None
    return name in _WAITING


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self._fresh: set[int] = set()  # storages made by what was recorded
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func._schema.name.removeprefix("aten::"), args, kwargs):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func._schema.is_mutable:
            self._save(given)
        outputs = func(*args, **kwargs)
        known = {_storage(t) for t in given}
        self._fresh.update(
            _storage(t) for t in tree_leaves(outputs) if isinstance(t, Tensor) and _storage(t) not in known
        )
        self.calls.append((func, args, kwargs, outputs))
        return outputs

    def _save(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = _storage(tensor)
            if storage not in self._fresh and storage not in self._before:
                whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
                self._before[storage] = whole, whole.clone()

    def undo(self) -> None:
        """A real capture runs nothing: put back what was written to memory from before it."""
        with torch.inference_mode():
            for tensor, before in self._before.values():
                tensor.copy_(before)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
