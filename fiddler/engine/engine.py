"""The public face: an engine is opened, asked for streams, and closed."""

import os
import weakref
from functools import partial
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import anyio
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fiddler.calibration.kernels import checked
from fiddler.config import EngineConfig
from fiddler.engine.loop import EngineLoop, ended
from fiddler.engine.thread import EngineThread, Loader
from fiddler.errors import CheckpointError, ConfigError, EngineClosedError, PromptError
from fiddler.given import shown
from fiddler.lanes.queues import Channel
from fiddler.models.generation import read_options
from fiddler.models.loaded import ServableModel
from fiddler.recording import RoutingTrace
from fiddler.steps.request import Submission
from fiddler.steps.stream import Item, TokenStream
from fiddler.text.prompts import Bound, Prompt, copy_prompt
from fiddler.trace import Trace
from fiddler.types import Result, Statistics, Timing


class Engine:
    """Runs one Mixture-of-Experts checkpoint for any number of concurrent requests.

    `model` is a checkpoint folder, a GGUF file, a hub id, or a `Loader`; `ServableModel.resolved` must then be what
    the loader's options resolve to. The engine is an async context manager under asyncio or trio. It runs in a
    thread of its own, so torch never blocks the caller's event loop. Once open, it neither reads nor changes what
    holds for the whole process: default dtype, random numbers, threads, logging, warnings. Opening raises
    `ModelError`, `ConfigError`, `EngineFailedError` where the process lacks a thread or file descriptors, or what
    a loader raises.

    Closing ends requests in flight with `EngineClosedError`. An engine is also closed when nothing refers to it or
    to a running stream of it, and when the program ends. If it fails, requests in flight and all later calls raise
    `EngineFailedError`. A forked child cannot use its parent's engine: that raises `EngineClosedError`, and closing
    it there does nothing.
    """

    def __init__(self, model: str | Path | Loader, config: EngineConfig | None = None) -> None:
        self.config = checked(config)
        self._model = _checked_model(model)
        self._thread: EngineThread | None = None
        self._open = False

    async def __aenter__(self) -> Self:
        if self._thread is not None:
            raise EngineClosedError("an engine is opened once; make a new Engine")
        thread = EngineThread(self._model, self.config)
        thread.start()
        self._thread = thread
        weakref.finalize(self, thread.close).atexit = False  # the thread does not know the engine
        try:
            await thread.booted.wait()
        except BaseException:
            thread.close()  # opening was cancelled: the thread ends once loading is done
            raise
        if thread.loaded is None:
            thread.join()
            raise thread.failure
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close; returns once the engine's thread has released everything. Nothing happens if it is closed."""
        self._open = False
        thread = self._thread
        if thread is not None and not thread.elsewhere:
            thread.close()
            with anyio.CancelScope(shield=True):
                await thread.ended.wait()
            thread.join()  # its last steps take no time

    def generate_stream(
        self, prompt: Prompt, generation: GenerationConfig | None = None, **overrides: Any
    ) -> TokenStream:
        """Submit a request and return its tokens as a stream.

        `prompt` is text, token ids (a 1-d array or tensor of whole numbers too), or chat messages. `overrides` are
        options of `GenerationConfig`, plus `seed` and `logprobs` (`True`: each token with its own); options left
        out are as the checkpoint's `generation_config.json` says. All arguments are copied now: changing them later
        changes nothing. Raises `GenerationError` for an option, and `EngineClosedError` or `EngineFailedError`, at
        once. Errors of the prompt (`PromptError`), or of an option together with it, are raised when the stream is
        awaited or read.
        """
        thread, loaded = self._opened()
        options = read_options(thread.defaults, generation, overrides)
        channel: Channel[Item] = Channel()
        try:
            bound = Bound.of(loaded.resolved.max_context, loaded.resolved.kv_tokens)
            submission = Submission(copy_prompt(prompt, bound), options, channel)
        except PromptError as error:
            channel.push(error)
            return TokenStream(channel, lambda: None)
        stream = TokenStream(channel, partial(thread.leave, submission), self)
        thread.submit(submission)  # after: whoever is interrupted here loses the stream, and that ends the request
        return stream

    async def generate(
        self, prompt: Prompt, generation: GenerationConfig | None = None, **overrides: Any
    ) -> Result:
        """Run a request to its end and return its result. Raises the errors of `generate_stream` and its stream."""
        submitted_s = perf_counter()
        async with self.generate_stream(prompt, generation, **overrides) as stream:
            tokens = [token async for token in stream]
        last = tokens[-1]
        assert last.finish_reason is not None
        assert last.usage is not None
        return Result(
            text="".join(token.text for token in tokens),
            token_ids=tuple(token.id for token in tokens),
            finish_reason=last.finish_reason,
            usage=last.usage,
            timing=Timing.of(tokens, submitted_s),
            logprobs=tuple(t.logprob for t in tokens if t.logprob is not None) or None,
        )

    @property
    def max_context(self) -> int:
        """Tokens a prompt and its completion may have together. Raises `EngineClosedError` unopened."""
        return self._opened()[1].resolved.longest

    def count_tokens(self, prompt: Prompt) -> int:
        """Return how many tokens a prompt takes; waits for the answer.

        Raises the prompt's errors as a stream does, and `EngineClosedError` unopened.
        """
        return len(self._opened()[1].text.encode(copy_prompt(prompt)))

    def _opened(self) -> tuple[EngineThread, ServableModel]:
        thread = self._here()
        if thread is not None:
            loaded = thread.loaded
            if self._open and loaded is not None:
                return thread, loaded
            if thread.opened and thread.error is not None:
                raise ended(thread.error)
        raise EngineClosedError("the engine is not open; use `async with Engine(...) as engine:`")

    def _here(self) -> EngineThread | None:
        """Return its thread, once there is one. Raises `EngineClosedError` if that runs in another process."""
        if self._thread is not None and self._thread.elsewhere:
            raise EngineClosedError("the engine was opened in the process that forked this one; open another here")
        return self._thread

    @property
    def _loop(self) -> EngineLoop | None:
        return self._thread.loop if self._thread is not None else None

    @property
    def _loaded(self) -> ServableModel | None:
        thread = self._here()
        return thread.loaded if thread is not None else None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """A copy of the checkpoint's tokenizer, for the caller to use and to change: the engine does not use it.

        It is made when it is first asked for; `None` where the checkpoint has none, or the engine is not open.
        Raises `EngineClosedError` in a forked child.
        """
        loaded = self._loaded
        return loaded.text.tokenizer if loaded is not None else None

    def statistics(self) -> Statistics:
        """Return counts of the engine's work and state at its latest step. Raises `EngineClosedError` unopened."""
        thread = self._here()
        statistics = thread.statistics if thread is not None else None
        if statistics is None:
            raise EngineClosedError("the engine was not opened")
        return statistics

    def trace(self) -> Trace:
        """Return the timeline of the run so far. Raises `ConfigError` unless `EngineConfig.trace` is on."""
        thread = self._here()
        recorded = thread.trace if thread is not None else None
        if recorded is None:
            raise ConfigError("no timeline is traced; set trace=True in EngineConfig")
        return recorded

    def routing(self) -> RoutingTrace:
        """Return a copy of the recorded routing of all requests so far, named by their order of admission from 0.

        A request that ran to its end has as many rows as its prompt and its tokens have, less one: the last token
        is not run. One that ended early, or has not ended, has the rows of the steps that succeeded; one without
        any is left out. Tokens that are run again, as Phi-MoE's are where its scale for long texts begins, are
        recorded as they ran last. Raises `ConfigError` unless `EngineConfig.record` is on.
        """
        thread = self._here()
        if thread is None or thread.recorder is None:
            raise ConfigError("no routing is recorded; set record=True in EngineConfig and open the engine")
        return thread.recorder.trace(thread.name)


def _checked_model(model: Any) -> str | Path | Loader:
    """Return a model argument, checked. Raises `CheckpointError` for a value that cannot name a model."""
    if isinstance(model, nn.Module):
        raise CheckpointError(
            "an engine opens a checkpoint: give the folder of the model instead of the loaded model; "
            "fiddler.attach(model) takes loaded ones"
        )
    if isinstance(model, str | Path) or (callable(model) and not isinstance(model, type)):
        return model
    try:
        return Path(os.fspath(model))
    except Exception as error:  # no path, or one of a class of the caller's that raises
        raise CheckpointError(
            f"model={shown(model)} is neither a checkpoint folder, a GGUF file, a hub id (owner/model) nor a "
            "function that makes a model"
        ) from error
