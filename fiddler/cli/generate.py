"""`fiddler generate`: one completion."""

import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from stat import S_ISFIFO, S_ISREG, S_ISSOCK
from typing import Annotated

import typer

from fiddler.cli.notes import Notes
from fiddler.cli.options import CheckpointOptions, EngineOptions, SamplingOptions
from fiddler.cli.terminal import INTERRUPTED, guarded
from fiddler.errors import PromptError

DEMO_PROMPT = "And it came to pass"


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """The prompt, and how the result is printed."""

    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", help="The prompt. Left out, it is read from a pipe, or else is a demonstration."
        ),
    ] = None
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, and nothing else, when all is done.")
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the text only.")] = False


def generate(
    checkpoint: CheckpointOptions, request: RequestOptions, sampling: SamplingOptions, engine: EngineOptions
) -> None:
    """Continue a prompt, and stream the text to stdout.

    Ctrl-C ends the completion and keeps what there is of it (exit code 130).
    """
    notes = Notes(quiet=request.as_json or request.quiet)
    with guarded():
        config = engine.config(checkpoint)
        prompt = _prompt(request.prompt, notes, demo=checkpoint.model is None)
        with notes.working(f"loading {checkpoint.name}", spin=checkpoint.is_local) as loaded:
            checkpoint.find()
            import anyio

            from fiddler.cli.session import ask_once, experts_json, simulated, virtual_json

            emit = _ignore if request.as_json else _write
            run = partial(ask_once, emit=emit, opened=loaded)
            machine = simulated(config)
            answer, statistics = anyio.run(run, checkpoint.source, config, prompt, sampling.overrides())
        if request.as_json:
            virtual = virtual_json(machine, statistics.n_new_tokens, statistics.step_s)
            print(json.dumps({**answer.as_json(), "virtual": virtual, "experts": experts_json(statistics)}))
        else:
            _write("\n")
        notes.summary(answer.usage, answer.timing, statistics, machine)
    if answer.interrupted:
        raise typer.Exit(INTERRUPTED)


def _prompt(given: str | None, notes: Notes, *, demo: bool) -> str:
    """Return the prompt: as given, as piped in, or the demonstration. Raises `PromptError` for undecodable text."""
    if given is None:
        given = _piped(notes)
    if given is None or (demo and not given):
        notes.say(f"prompt: {DEMO_PROMPT}")
        return DEMO_PROMPT
    try:
        return given.encode(errors="surrogateescape").decode()  # whatever the terminal's language made of its bytes
    except UnicodeError as error:
        raise PromptError(f"the prompt is not valid UTF-8: {error}") from error


def _piped(notes: Notes) -> str | None:
    """Return the text of a pipe or a file on stdin, but for a final newline; `None` without one."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return None
    if not (S_ISFIFO(mode) or S_ISREG(mode) or S_ISSOCK(mode)):
        return None
    notes.say("prompt: from standard input")  # should nothing ever come, this is why nothing happens
    return without_newline(sys.stdin.buffer.read().decode(errors="surrogateescape"))


def without_newline(text: str) -> str:
    """Return a text without one final newline: `echo` and editors add it."""
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _ignore(text: str) -> None:
    """Print nothing: the text will be in the JSON object."""
