"""An NVIDIA GPU through torch: the only place that says `torch.cuda`.

Facts that this file relies on, with their sources:

- Streams of torch's pool, made with `cudaStreamNonBlocking`, do not wait for the default stream (CUDA C++
  Programming Guide, "Default Stream"): events are the only order there is between them.
- A copy between pinned memory and the GPU lets the host go on (CUDA Runtime API, "API synchronization behavior");
  memory locked with `cudaHostRegister` counts as pinned, for torch asks `cudaPointerGetAttributes`.
- Freed GPU memory goes to the next allocation on the same stream, in that stream's order (PyTorch, "CUDA
  semantics", "Memory management"): memory that another stream reads may be freed once the main stream follows it.
- A capture records what its stream is given and runs nothing; with `thread_local` other threads may go on using the
  GPU meanwhile (PyTorch, `torch.cuda.CUDAGraph`).
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

from fiddler.errors import ConfigError
from fiddler.gpu.device import Event, Memory

T = TypeVar("T")
logger = logging.getLogger("fiddler")

_captures = Lock()
"""A lock held by the thread that records a graph."""
_void: list[object] = []
"""Graphs whose capture failed."""
_PORTABLE = 1
"""`cudaHostRegisterPortable`: pinned for every context. Source: CUDA Runtime API, `cudaHostRegister`."""


class CudaEvent:
    """A recorded `torch.cuda.Event`."""

    __slots__ = ("event",)

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(enable_timing=True, blocking=True)
        self.event.record(stream)

    def done(self) -> bool:
        """Whether the stream has passed it."""
        return bool(self.event.query())

    def wait(self) -> None:
        """Wait until the stream has passed it."""
        self.event.synchronize()

    def since(self, earlier: Event) -> float:
        """Return the seconds between, to half a microsecond (CUDA Runtime API, `cudaEventElapsedTime`)."""
        assert isinstance(earlier, CudaEvent)
        return float(earlier.event.elapsed_time(self.event)) / 1e3


class CudaStream:
    """A `torch.cuda.Stream`."""

    __slots__ = ("stream",)

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], object]) -> None:
        """Queue the launches of `work`."""
        with torch.cuda.stream(self.stream):
            work()

    def mark(self) -> CudaEvent:
        """Return the point behind everything queued so far."""
        return CudaEvent(self.stream)

    def follow(self, event: Event) -> None:
        """Wait, on the GPU, for another stream."""
        assert isinstance(event, CudaEvent)
        self.stream.wait_event(event.event)


class CudaGpu:
    """The current CUDA device. Raises `ConfigError` where torch sees none."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("device='cuda' needs an NVIDIA GPU and a torch built for it; set device='cpu'")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        self.main, self.link, self.down, self.up = (CudaStream(self.device) for _ in range(4))

    def enter(self) -> None:
        """Make the main stream this thread's current one: torch keeps one for each thread."""
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(self.main.stream)
        # Where torch prefers cuDNN's attention it makes a plan for every new length of a past, on the host, and on
        # Blackwell decodes wrongly with few key heads (pytorch issue 193893). This holds for the whole process.
        torch.backends.cuda.enable_cudnn_sdp(False)

    def launch(self, work: Callable[[], T]) -> T:
        """Run code on the main stream, which `enter` has made current."""
        return work()

    def pin(self, memory: Tensor) -> bool:
        """Lock host memory into RAM; whether that was possible."""
        cudart: Any = torch.cuda.cudart()
        error = int(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))
        if error:
            logger.debug("cudaHostRegister of %d bytes: error %d", memory.nbytes, error)
            with suppress(RuntimeError):  # torch reads and resets the last error: the next launch would be blamed
                torch.zeros(1, device=self.device)
        return not error

    def unpin(self, memory: Tensor) -> None:
        """Unlock host memory."""
        cudart: Any = torch.cuda.cudart()
        cudart.cudaHostUnregister(memory.data_ptr())

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return pinned memory of torch's own pool, which gives none out again before its copies are through."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def pool(self) -> object:
        """Return a handle of graph memory."""
        return torch.cuda.graph_pool_handle()

    def capture(self, pool: object, work: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """Record the launches of `work` on the main stream, which must be current.

        Not through `torch.cuda.graph`: it collects garbage and waits for the GPU, once a graph, and a model has one
        for each layer.
        """
        graph: Any = torch.cuda.CUDAGraph()
        with _captures:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                with suppress(RuntimeError):  # what `work` raised says more than that the capture is void
                    self._end(graph, pool)
                raise
            self._end(graph, pool)
        return graph, result

    def _end(self, graph: Any, pool: Any) -> None:
        """End a capture. Where it is void, torch below 2.13 leaves its allocator in it (`CUDAGraph.cpp`)."""
        try:
            graph.capture_end()
        except RuntimeError:
            _void.append(graph)  # the allocator still asks it which streams it is for
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index, pool)
            raise

    def memory(self) -> Memory:
        """Return the free memory, unused memory that torch holds included."""
        free, total = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return Memory(free + held, total)

    def peak(self, work: Callable[[], object]) -> int:
        """Return the most bytes that torch hands out while `work` runs, counted when it allocates them."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        return torch.cuda.max_memory_allocated(self.device) - before

    def reclaim(self) -> None:
        """Give back memory that torch holds and nothing uses."""
        with _captures:  # torch may not while any engine of this process records
            torch.cuda.empty_cache()


def open_gpu() -> CudaGpu:
    """Return the GPU that `device='cuda'` means. Raises `ConfigError` where torch sees none."""
    return CudaGpu()
