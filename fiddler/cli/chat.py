"""`fiddler chat`: a conversation."""

import json
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fiddler.cli.flags import spoken
from fiddler.cli.notes import Notes, speed, virtual_speed
from fiddler.cli.options import DEFAULT_NEW_TOKENS, CheckpointOptions, EngineOptions, SamplingOptions
from fiddler.cli.terminal import complain, guarded, on_sigint
from fiddler.errors import RequestError

if TYPE_CHECKING:
    from fiddler.engine.engine import Engine


HINT = "/reset forgets the conversation, /exit or ctrl-D leaves, ctrl-C stops an answer"


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The conversation's start, and how it is printed."""

    system: Annotated[str | None, typer.Option("--system", help="The system message.")] = None
    as_json: Annotated[
        bool, typer.Option("--json", help="Read a message a line; print a JSON object an answer.")
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the answers only.")] = False


class History:
    """The messages so far, within the model's context: the oldest turns go, the system message stays.

    `n_wanted` is the length of answers that room is kept for, as far as a quarter of the context.
    Raises `PromptError` where the checkpoint has no chat template.
    """

    def __init__(self, engine: "Engine", system: str | None, n_wanted: int | None) -> None:
        self._engine = engine
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []
        self._n_wanted = DEFAULT_NEW_TOKENS if n_wanted is None else n_wanted
        engine.count_tokens([{"role": "user", "content": "?"}])

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages for the model."""
        return [*self._system, *self._turns]

    @property
    def n_answer(self) -> int:
        """Tokens the next answer may have; at least 1, so that an impossible prompt is refused by the engine."""
        return max(min(self._n_wanted, self._room()), 1)

    def ask(self, question: str) -> int:
        """Add the user's message; returns how many old messages were dropped for it."""
        self._turns.append({"role": "user", "content": question})
        n_kept_free = min(self._n_wanted, self._engine.max_context // 4)
        n_dropped = 0
        while len(self._turns) > 1 and self._room() < n_kept_free:
            del self._turns[:2]
            n_dropped += 2
        return n_dropped

    def reply(self, text: str, *, kept: bool) -> None:
        """Add the model's message, or forget the question if nothing is to be `kept`."""
        if kept:
            self._turns.append({"role": "assistant", "content": text})
        else:
            self.forget_question()

    def forget_question(self) -> None:
        """Take back a question that was not answered."""
        if self._turns and self._turns[-1]["role"] == "user":
            self._turns.pop()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._turns.clear()

    def _room(self) -> int:
        return self._engine.max_context - self._engine.count_tokens(self.messages)


def chat(
    checkpoint: CheckpointOptions, conversation: ChatOptions, sampling: SamplingOptions, engine: EngineOptions
) -> None:
    """Talk with a model.

    /reset forgets the conversation; /exit, ctrl-D, or ctrl-C at the prompt leaves; ctrl-C stops an answer.
    """
    notes = Notes(quiet=conversation.as_json or conversation.quiet)
    with guarded():
        config = engine.config(checkpoint)
        with notes.working(f"loading {checkpoint.name}", spin=checkpoint.is_local) as loaded:
            checkpoint.find()
            import anyio

            from fiddler.engine.engine import Engine

            async def run() -> None:
                async with Engine(checkpoint.source, config) as opened:
                    loaded()
                    history = History(opened, conversation.system, sampling.max_new_tokens)
                    await _converse(opened, history, sampling.overrides(), notes, conversation)

            anyio.run(run)


async def _converse(
    engine: "Engine", history: History, overrides: dict[str, Any], notes: Notes, options: ChatOptions
) -> None:
    if sys.stdin.isatty():
        notes.say(HINT)
    while (message := _read()) not in (None, "/exit"):
        if message == "/reset":
            history.reset()
            notes.say("(the conversation starts anew)")
        elif message:
            try:
                await _answer(engine, history, str(message), overrides, notes, as_json=options.as_json)
            except RequestError as error:
                history.forget_question()
                complain(error)
                if options.as_json:
                    _write(json.dumps({"error": spoken(str(error))}) + "\n")


async def _answer(
    engine: "Engine",
    history: History,
    message: str,
    overrides: dict[str, Any],
    notes: Notes,
    *,
    as_json: bool,
) -> None:
    from fiddler.cli.session import ask, simulated, virtual_json

    n_dropped = history.ask(message)
    if n_dropped:
        notes.say(f"(the context is full: the oldest {n_dropped} messages were dropped)")
    options = {**overrides, "max_new_tokens": history.n_answer}
    before = engine.statistics()
    answer = await ask(engine, history.messages, options, (lambda text: None) if as_json else _write)
    history.reply(answer.text, kept=bool(answer.text) or not answer.interrupted)
    now = engine.statistics()
    n_tokens, step_s = now.n_new_tokens - before.n_new_tokens, now.step_s - before.step_s
    machine = simulated(engine.config)
    if as_json:
        virtual = virtual_json(machine, n_tokens, step_s)
        _write(json.dumps({**answer.as_json(), "virtual": virtual, "dropped_messages": n_dropped}) + "\n")
    else:
        _write("\n")
        virtually = f" {virtual_speed(n_tokens, step_s)}" if machine is not None else ""
        notes.say(speed(answer.timing) + virtually + (" stopped" if answer.interrupted else ""))


def _read() -> str | None:
    """Return the next message, `None` at the end of input or at ctrl-C.

    Blocks the event loop, which has nothing else to do: the engine has a thread of its own.
    """
    with on_sigint(signal.default_int_handler):
        try:
            if not sys.stdin.isatty():
                line = sys.stdin.buffer.readline()
                return line.decode(errors="replace").strip() if line else None
            return _prompted()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return None


def _prompted() -> str:
    """Return a line typed at a prompt, with history and editing where the platform has them."""
    with suppress(ImportError):
        import readline  # noqa: F401  # input() uses it once it is imported
    if sys.stdout.isatty():
        return input("> ").strip()
    print("> ", end="", file=sys.stderr, flush=True)
    return input().strip()


def _write(text: str) -> None:
    print(text, end="", flush=True)
