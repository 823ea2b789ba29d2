"""An engine's thread: loads the model, serves requests, and releases everything, however it ends.

It does not refer to the `Engine`: an engine that nothing refers to is collected, and that closes it.
"""

import atexit
import errno
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from time import monotonic
from weakref import WeakSet

import torch

from fiddler.calibration.kernels import choose_kernels, choose_threads
from fiddler.config import EngineConfig
from fiddler.engine.assembly import assemble_rig
from fiddler.engine.loop import Close, End, EngineLoop, Message, Submit
from fiddler.engine.waiting import Reading
from fiddler.errors import EngineClosedError, EngineFailedError
from fiddler.lanes.queues import Latch, Mailbox
from fiddler.models import dense
from fiddler.models.alone import check_before
from fiddler.models.generation import Defaults
from fiddler.models.loaded import ServableModel, load
from fiddler.steps.recorder import Recorder
from fiddler.steps.request import Submission
from fiddler.trace import Trace
from fiddler.types import Statistics

Loader = Callable[[EngineConfig], ServableModel]
"""Makes a model that is in no checkpoint, in the engine's thread and for the engine's options."""

LEAVE_S = 30.0
"""Seconds that the end of a program waits for its engines. A thread that is in torch by then aborts the process."""


class EngineThread:
    """One engine's life, from loading to the end. `booted` and `ended` are always set in the end."""

    def __init__(self, model: str | Path | Loader, config: EngineConfig) -> None:
        self.inbox: Mailbox[Message] = Mailbox()
        self.booted = Latch()
        """Set once requests may come, or never will."""
        self.ended = Latch()
        """Set once everything is released."""
        self.error: BaseException | None = None
        """The error that ended it, if it was not closed."""
        self.opened = False
        """Whether it was ever open."""
        self.loaded: ServableModel | None = None
        """Its model, while it is open."""
        self.loop: EngineLoop | None = None
        """Its loop, while it is open."""
        self.defaults = Defaults.of({}, 0)
        """The generation options of its checkpoint."""
        self.name = ""
        self.trace: Trace | None = None
        self.recorder: Recorder | None = None
        self._model = model
        self._config = config
        self._latest: Statistics | None = None
        self._closing = False
        self._pid = os.getpid()
        self._n_threads = torch.get_num_threads()  # of the caller's thread: each has its own setting
        self._thread = Thread(target=self._run, name="fiddler-engine", daemon=True)

    def start(self) -> None:
        """Start the thread. Raises `EngineFailedError` where the machine has no thread left."""
        try:
            self._thread.start()
        except RuntimeError as error:
            raise EngineFailedError(f"the engine's thread could not be started: {error}") from error
        _running.add(self)

    @property
    def elsewhere(self) -> bool:
        """Whether it runs in another process, which has forked this one; none of its locks may be touched here."""
        return os.getpid() != self._pid

    @property
    def statistics(self) -> Statistics | None:
        """The state after the latest step; `None` before the first."""
        loop = self.loop
        return loop.statistics if loop is not None else self._latest

    def close(self) -> None:
        """Ask it to end, from any thread, any number of times."""
        if not self.elsewhere:
            self._closing = True
            self.inbox.push(Close())

    def submit(self, submission: Submission) -> None:
        """Submit a request, from any thread; a late one is answered with the engine's error."""
        loop = self.loop
        if loop is not None:
            loop.submit(submission)
        else:
            self.inbox.push(Submit(submission, Reading(submission)))  # sealed by now: it is refused

    def leave(self, submission: Submission) -> None:
        """Tell it that a request was left, from any thread."""
        if not self.elsewhere:
            self.inbox.push(End(submission))

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for its end. A thread that frees tensors while the interpreter ends aborts the process."""
        if not self.elsewhere and self._thread.ident is not None:
            self._thread.join(timeout_s)

    @property
    def failure(self) -> Exception:
        """Return why it could not be opened, as an `Exception`: other errors would end the caller's program."""
        error = self.error
        if error is None:
            return EngineClosedError("the engine was closed while it was opened")
        if (without := _without_descriptors(error)) is not None:  # whichever file it was that could not be opened
            failure = EngineFailedError(f"the process has no file descriptor left ({without}); raise `ulimit -n`")
        elif isinstance(error, Exception):
            return error
        else:
            failure = EngineFailedError(f"the engine could not be opened: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure

    def _run(self) -> None:
        try:
            self._live()
        except BaseException as error:
            self.error = error
            _clear(error)
        finally:
            if self.loop is not None:
                self._latest = self.loop.statistics
            self.loaded = self.loop = None
            torch.set_num_threads(self._n_threads)  # threads made from now on take the latest setting
            self.booted.set()
            self.ended.set()

    def _check(self) -> None:
        """Raise where opening has been cancelled, before work that takes long."""
        if self._closing:
            raise self.failure

    def _live(self) -> None:
        loaded, loop = self._load()

        def ready() -> None:
            self.loaded, self.loop, self.opened = loaded, loop, True
            self.booted.set()

        loop.serve(ready)

    def _load(self) -> tuple[ServableModel, EngineLoop]:
        model, config = self._model, self._config
        check_before(self._check)
        loaded = model(config) if callable(model) else load(model, config)
        self._check()  # calibrating takes seconds
        self.name = _name(model, loaded)
        self.defaults = Defaults.of_model(loaded.model, has_tokenizer=loaded.text.known)
        choose_threads(loaded, config, self._n_threads)
        on_gpu = loaded.resolved.device == "cuda"  # then the dense part is no business of the CPU's kernels
        kernels = choose_kernels(loaded, config, with_dense=not on_gpu)
        if not on_gpu:
            dense.accelerate(loaded.model, kernels)
        rig = assemble_rig(loaded, kernels, config)
        self.trace, self.recorder = rig.trace, rig.recorder
        loop = EngineLoop(loaded, rig, self.inbox, max_running=config.max_running, chunk_tokens=config.chunk_tokens)
        return loaded, loop


def _name(model: str | Path | Loader, loaded: ServableModel) -> str:
    """Return a model's name: its folder's name, its hub id, or the one in its configuration."""
    if callable(model):
        return loaded.model.name_or_path or str(loaded.model.config.model_type)
    folder = Path(model).expanduser()
    return folder.absolute().name if folder.is_dir() else str(model)


def _without_descriptors(error: BaseException) -> OSError | None:
    """Return what says that the process, or the system, has no file descriptor left, among an error's causes."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.EMFILE, errno.ENFILE):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _clear(error: BaseException) -> None:
    """Clear the frames of an error, which may hold a whole model; its traceback stays readable."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__


_running: WeakSet[EngineThread] = WeakSet()


@atexit.register
def _leave() -> None:
    """End the engines that a program leaves open. A forked child has none: they are its parent's."""
    threads = [thread for thread in _running if not thread.elsewhere]
    for thread in threads:
        thread.close()
    until = monotonic() + LEAVE_S
    for thread in threads:
        thread.join(max(0.0, until - monotonic()))
