"""The public face: an engine is opened, asked for streams, and closed."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import anyio
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fiddler.cache.recorded import RoutingTrace
from fiddler.config import EngineConfig
from fiddler.engine.loop import Close, Command, End, EngineLoop
from fiddler.engine.request import Submission
from fiddler.engine.rig import assemble_rig
from fiddler.engine.setup import choose_kernels, choose_threads
from fiddler.engine.stream import Item, TokenStream
from fiddler.errors import ConfigError, EngineClosedError
from fiddler.lanes.channel import Channel
from fiddler.models import dense
from fiddler.models.loaded import ServableModel, load
from fiddler.models.sampling import read_options
from fiddler.models.text import Prompt
from fiddler.trace import Trace
from fiddler.types import Result, Statistics, Timing, Token

Loader = Callable[[EngineConfig], ServableModel]
"""Makes a model that is in no checkpoint, for the options of the engine that asks, in that engine's thread."""


class Engine:
    """Runs one Mixture-of-Experts checkpoint for any number of concurrent requests.

    `model` is a checkpoint folder, a hub id, or a `Loader`; `ServableModel.resolved` must then be what the loader's
    options resolve to. The engine is an async context manager; it works under asyncio and trio, in a thread and an
    event loop of its own, so torch never blocks the caller's. Opening raises `ModelError`, `ConfigError`, or what a
    loader raises. Closing ends what is in flight with `EngineClosedError`.
    """

    def __init__(self, model: str | Path | Loader, config: EngineConfig | None = None) -> None:
        self.config = config if config is not None else EngineConfig()
        self._model = model
        self._inbox: Channel[Command] = Channel()
        self._boot: Channel[ServableModel | BaseException] = Channel()
        self._gone: Channel[None] = Channel()
        self._loop: EngineLoop | None = None
        self._loaded: ServableModel | None = None
        self._name = ""
        self._open = False
        self._n_threads = torch.get_num_threads()  # of the caller's thread: each has its own setting
        self._thread = Thread(target=self._run, name="fiddler-engine", daemon=True)

    async def __aenter__(self) -> Self:
        if self._thread.ident is not None:
            raise EngineClosedError("an engine is opened once; make a new Engine")
        self._thread.start()
        try:
            booted = await self._boot.receive()
        except BaseException:
            self._inbox.push(Close())  # opening was cancelled: the thread ends once loading is done
            raise
        if isinstance(booted, BaseException):
            self._thread.join()
            raise booted
        self._loaded = booted
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close; returns once the engine's thread has let go of everything. Nothing happens if it is closed."""
        if self._open:
            self._open = False
            self._inbox.push(Close())
            with anyio.CancelScope(shield=True):
                await self._gone.receive()
            # Its last steps take no time, but a thread that frees tensors while the interpreter ends aborts it.
            self._thread.join()

    def generate_stream(
        self, prompt: Prompt, generation: GenerationConfig | None = None, **overrides: Any
    ) -> TokenStream:
        """Submit a request and return its tokens as a stream.

        `prompt` is text, token ids, or chat messages. `overrides` are options of `GenerationConfig`, plus `seed`
        and `logprobs`. Raises `GenerationError` for an option and `EngineClosedError` at once; what is wrong with
        the prompt (`PromptError`) is raised when the stream is awaited or read.
        """
        default = self._opened().model.generation_config or GenerationConfig()
        options = read_options(default, generation, overrides)
        channel: Channel[Item] = Channel()
        submission = Submission(prompt, options, channel)
        inbox = self._inbox
        assert self._loop is not None
        self._loop.submit(submission)
        return TokenStream(channel, lambda: inbox.push(End(submission)))

    async def generate(
        self, prompt: Prompt, generation: GenerationConfig | None = None, **overrides: Any
    ) -> Result:
        """Run a request to its end and return it whole. Raises what `generate_stream` and its stream raise."""
        started = perf_counter()
        first_s = 0.0
        tokens: list[Token] = []
        async with self.generate_stream(prompt, generation, **overrides) as stream:
            async for token in stream:
                first_s = first_s or perf_counter() - started
                tokens.append(token)
        last = tokens[-1]
        assert last.finish_reason is not None
        assert last.usage is not None
        return Result(
            text="".join(token.text for token in tokens),
            token_ids=tuple(token.id for token in tokens),
            finish_reason=last.finish_reason,
            usage=last.usage,
            timing=Timing(first_s, perf_counter() - started, len(tokens)),
            logprobs=tuple(t.logprob for t in tokens if t.logprob is not None) or None,
        )

    @property
    def max_context(self) -> int:
        """Tokens a prompt and its completion may have together. Raises `EngineClosedError` unopened."""
        return self._opened().resolved.longest

    def count_tokens(self, prompt: Prompt) -> int:
        """Return how many tokens a prompt takes; waits for the answer. Raises as a stream does, for the prompt."""
        return len(self._opened().text.encode(prompt))

    def _opened(self) -> ServableModel:
        if not self._open or self._loaded is None:
            raise EngineClosedError("the engine is not open; use `async with Engine(...) as engine:`")
        return self._loaded

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """A copy of the checkpoint's tokenizer, for the caller to use and to change: the engine does not use it.

        It is made when it is first asked for; `None` where the checkpoint has none, or the engine is not open.
        """
        return self._loaded.text.tokenizer if self._loaded is not None else None

    def statistics(self) -> Statistics:
        """Return what the engine has done and holds, as of its latest step. Raises `EngineClosedError` unopened."""
        if self._loop is None:
            raise EngineClosedError("the engine was not opened")
        return self._loop.statistics

    def trace(self) -> Trace:
        """Return the record of the run so far. Raises `ConfigError` unless `EngineConfig.trace` is on."""
        recorded = self._loop.trace if self._loop is not None else None
        if recorded is None:
            raise ConfigError("nothing is recorded; set trace=True in EngineConfig")
        return recorded

    def routing(self) -> RoutingTrace:
        """Return a copy of the recorded routing of all requests so far, named by their order of admission from 0.

        A request that ran to its end has as many rows as its prompt and its tokens have, less one: the last token
        is not run. One that ended early, or has not ended, has the rows of the steps that succeeded; one without
        any is left out. Raises `ConfigError` unless `EngineConfig.record` is on.
        """
        recorder = self._loop.recorder if self._loop is not None else None
        if recorder is None:
            raise ConfigError("no routing is recorded; set record=True in EngineConfig and open the engine")
        return recorder.trace(self._name)

    def _run(self) -> None:
        """Be the engine's thread."""
        try:
            model = self._model
            loaded = model(self.config) if callable(model) else load(model, self.config)
            self._name = _name(model, loaded)
            choose_threads(loaded, self.config, self._n_threads)
            on_gpu = loaded.resolved.device == "cuda"  # then the dense part is no business of the CPU's kernels
            kernels = choose_kernels(loaded, self.config, with_dense=not on_gpu)
            if not on_gpu:
                dense.accelerate(loaded.model, kernels)
            rig = assemble_rig(loaded, kernels, self.config)
            self._loop = EngineLoop(
                loaded,
                rig,
                self._inbox,
                max_running=self.config.max_running,
                chunk_tokens=self.config.chunk_tokens,
            )
        except BaseException as error:
            self._boot.push(error)
            return
        self._boot.push(loaded)
        uvloop = importlib.util.find_spec("uvloop") is not None
        try:
            anyio.run(self._loop.serve, backend_options={"use_uvloop": uvloop})
        finally:
            torch.set_num_threads(self._n_threads)  # threads made from now on take the latest setting
            self._loaded = None
            self._gone.push(None)


def _name(model: str | Path | Loader, loaded: ServableModel) -> str:
    """Return what a model is called: its folder's name, its hub id, or what it says of itself."""
    if callable(model):
        return loaded.model.name_or_path or str(loaded.model.config.model_type)
    folder = Path(model).expanduser()
    return folder.absolute().name if folder.is_dir() else str(model)
