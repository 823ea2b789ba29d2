"""Runs requests of a command in an engine. Importing this imports torch and transformers."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from signal import SIGINT, signal
from time import perf_counter
from typing import Any, Literal

import anyio
from anyio import lowlevel

from fiddler.cli.options import DEFAULT_NEW_TOKENS
from fiddler.cli.record import Named
from fiddler.cli.terminal import leave_at_once, on_sigint
from fiddler.config import EngineConfig
from fiddler.engine.engine import Engine
from fiddler.errors import PromptError
from fiddler.recording import RoutingTrace
from fiddler.text.prompts import Prompt
from fiddler.types import FinishReason, Statistics, Timing, Token, Usage


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion, or the part before a ctrl-C."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | Literal["interrupted"]
    usage: Usage
    timing: Timing

    @property
    def interrupted(self) -> bool:
        """Whether ctrl-C ended it."""
        return self.finish_reason == "interrupted"

    def as_json(self) -> dict[str, Any]:
        """Return the fields every JSON answer has."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "usage": {**asdict(self.usage), "total_tokens": self.usage.total_tokens},
            "timing": {
                "first_token_s": self.timing.first_token_s,
                "total_s": self.timing.total_s,
                "tokens_per_s": self.timing.tokens_per_s,
            },
        }


def experts_json(statistics: Statistics) -> dict[str, Any]:
    """Return where the experts ran, the bytes read for them, and how they came to the accelerator."""
    return {
        "visits": statistics.n_expert_rows,
        "cpu_visits": statistics.cpu.n_rows,
        "accelerator_visits": statistics.gpu.n_rows,
        "loads": statistics.n_expert_loads,
        "bytes_read": statistics.expert_bytes,
        "compute_s": statistics.expert_s,
        "bytes_per_s": statistics.expert_bytes / statistics.expert_s if statistics.expert_s else 0.0,
        "slots": statistics.n_slots,
        "slots_used": statistics.n_slots_used,
        "hits": statistics.n_hits,
        "fetches": statistics.n_fetches,
        "promotions": statistics.n_promotions,
        "prefetch": asdict(statistics.prefetch),
        "fallbacks": statistics.n_fallbacks,
        "dead_lanes": list(statistics.dead_lanes),
        "copied_bytes": statistics.link.n_bytes,
        "prediction_error": statistics.prediction_error,
    }


def simulated(config: EngineConfig) -> str | None:
    """Return the machine that is simulated in virtual time, if one is."""
    return config.device.partition(":")[2] or None


def virtual_json(machine: str | None, n_tokens: int, step_s: float) -> dict[str, Any] | None:
    """Return how long tokens took on a simulated machine's clock; `None` in wall time."""
    if machine is None:
        return None
    return {"machine": machine, "step_s": step_s, "tokens_per_s": n_tokens / step_s if step_s else 0.0}


async def ask(engine: Engine, prompt: Prompt, overrides: dict[str, Any], emit: Callable[[str], None]) -> Answer:
    """Return the engine's answer, each piece of text given to `emit` as it comes; ctrl-C ends the answer.

    Raises the errors of `Engine.generate_stream` and its stream.
    """
    n_prompt = engine.count_tokens(prompt)
    options = _options(engine, n_prompt, overrides)
    submitted_s = perf_counter()
    tokens: list[Token] = []
    with interruptible():
        async with engine.generate_stream(prompt, **options) as stream:
            async for token in stream:
                tokens.append(token)
                emit(token.text)
    return Answer(
        text="".join(token.text for token in tokens),
        token_ids=tuple(token.id for token in tokens),
        finish_reason=(tokens[-1].finish_reason if tokens else None) or "interrupted",
        usage=Usage(n_prompt, len(tokens)),
        timing=Timing.of(tokens, submitted_s),
    )


def _options(engine: Engine, n_prompt: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return a request's options; if no length was given, one that fits into the context is set."""
    room = max(engine.max_context - n_prompt, 1)
    return {"max_new_tokens": min(DEFAULT_NEW_TOKENS, room), **overrides}


async def ask_once(
    model: str | Path,
    config: EngineConfig,
    prompt: Prompt,
    overrides: dict[str, Any],
    *,
    emit: Callable[[str], None],
    opened: Callable[[], None],
) -> tuple[Answer, Statistics]:
    """Open an engine, ask, close it; `opened` is called when it is ready. Returns its final statistics as well."""
    engine = Engine(model, config)
    async with engine:
        opened()
        answer = await ask(engine, prompt, overrides, emit)
    return answer, engine.statistics()


async def record(
    model: str | Path,
    config: EngineConfig,
    prompts: Sequence[Named],
    overrides: dict[str, Any],
    *,
    opened: Callable[[], None],
) -> tuple[RoutingTrace, bool]:
    """Open an engine, run prompts side by side, close it; `opened` is called when it is ready.

    Returns their routing under their names, and whether ctrl-C ended them before their time. Raises the errors of
    `Engine.generate_stream` and its streams; a `PromptError` says of which prompt.
    """
    engine = Engine(model, config)
    interrupted = True
    async with engine:
        lengths = [_count(engine, *named) for named in prompts]
        streams = [
            engine.generate_stream(prompt, **_options(engine, n_prompt, overrides))
            for (_, prompt), n_prompt in zip(prompts, lengths, strict=True)
        ]
        opened()
        with interruptible():
            for stream in streams:
                async for _ in stream:
                    pass
            interrupted = False
    routing = engine.routing()
    named = tuple(replace(recording, name=prompts[int(recording.name)][0]) for recording in routing.recordings)
    return replace(routing, recordings=named), interrupted


def _count(engine: Engine, name: str, prompt: Prompt) -> int:
    try:
        return engine.count_tokens(prompt)
    except PromptError as error:
        raise PromptError(f"prompt {name!r}: {error}") from error


@contextmanager
def interruptible() -> Generator[None]:
    """Let ctrl-C leave the block, at the block's next await; a second one, if that takes long, ends the process."""
    loop: Any = lowlevel.current_token().native_token

    def cancel(*_signal: object) -> None:
        signal(SIGINT, leave_at_once)
        loop.call_soon_threadsafe(scope.cancel)  # from a signal handler only this wakes a waiting loop

    with anyio.CancelScope() as scope, on_sigint(cancel):
        yield
