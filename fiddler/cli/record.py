"""`fiddler record` (once `trace`): records which experts every token visits, and how predictable that was.

It also prints how often experts recur from token to token, and how many visits a look-ahead foresaw.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fiddler.cli.flags import giving
from fiddler.cli.notes import Notes, size
from fiddler.cli.options import CheckpointOptions, EngineOptions, SamplingOptions
from fiddler.cli.terminal import INTERRUPTED, guarded
from fiddler.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from fiddler.recording import RoutingTrace, Share


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """What is run, and where the routing goes."""

    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="A prompt; may be given several times.")] = (
        field(default_factory=list)
    )
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE.txt|FILE.jsonl",
            help='Prompts, one a line; a line of JSON is {"prompt": ..., "name": ...}.',
        ),
    ] = None
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.safetensors", help="Where the routing is written.")
    ] = Path("routing.safetensors")
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False


def record(
    checkpoint: CheckpointOptions, request: RecordOptions, sampling: SamplingOptions, engine: EngineOptions
) -> None:
    """Record which experts every token of some prompts and their completions visits.

    The prompts run side by side. Ctrl-C ends them and keeps what was recorded (exit code 130).
    """
    notes = Notes(quiet=request.as_json)
    with guarded():
        config = replace(engine.config(checkpoint), record=True)
        prompts = read_prompts(request.prompt, request.prompts, demo=checkpoint.model is None)
        with giving("--output"):
            _check_output(request.output)
        with notes.working(f"loading {checkpoint.name}", spin=checkpoint.is_local) as loaded:
            checkpoint.find()
            import anyio

            from fiddler.cli import session

            run = partial(session.record, opened=loaded)
            routing, interrupted = anyio.run(run, checkpoint.source, config, prompts, sampling.overrides())
        if routing.recordings:
            from fiddler.lab.traces import save

            save(request.output, routing)
            _show(routing, request, interrupted=interrupted)
        else:
            notes.say("nothing was recorded")
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _check_output(file: Path) -> None:
    """Raise `ConfigError` for a file that cannot be written, before anything is run."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ConfigError(f"{file} cannot be written: there is {'a' if file.is_dir() else 'no'} folder")
    if file.exists() and not file.is_file():  # the new file would take the place of a device or a pipe
        raise ConfigError(f"{file} cannot be written: it is not a regular file; give another file")


def _show(routing: "RoutingTrace", request: RecordOptions, *, interrupted: bool) -> None:
    if request.as_json:
        print(json.dumps({**_as_json(routing), **_file(request.output), "interrupted": interrupted}))
    else:
        Console(highlight=False).print(_table(routing, request.output))


def _file(file: Path) -> dict[str, Any]:
    return {"file": str(file), "file_bytes": file.stat().st_size}


def _as_json(routing: "RoutingTrace") -> dict[str, Any]:

    sequences = [
        {"name": r.name, "prompt_tokens": r.n_prompt, "decode_tokens": len(r.experts) - r.n_prompt}
        for r in routing.recordings
    ]
    from fiddler.recording import foreseen, recurrence

    again, ahead = recurrence(routing), foreseen(routing)
    return {
        "model": routing.model,
        "layers": len(routing.n_experts),
        "experts": list(routing.n_experts),
        "top_k": routing.recordings[0].experts.shape[2],
        "sequences": sequences,
        "prompt_tokens": sum(r.n_prompt for r in routing.recordings),
        "decode_tokens": sum(len(r.experts) - r.n_prompt for r in routing.recordings),
        "recurrence": again.as_json() if again is not None else None,
        "look_ahead": ahead.as_json() if ahead is not None else None,
    }


def _table(routing: "RoutingTrace", file: Path) -> Table:
    from fiddler.recording import foreseen, recurrence

    n_prompt = sum(r.n_prompt for r in routing.recordings)
    n_decode = sum(len(r.experts) for r in routing.recordings) - n_prompt
    least, most = min(routing.n_experts), max(routing.n_experts)
    n_experts, top_k = f"{most}" if least == most else f"{least} to {most}", routing.recordings[0].experts.shape[2]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("model", routing.model)
    table.add_row("sequences", f"{len(routing.recordings):,}")
    table.add_row("tokens", f"{n_prompt:,} prompt, {n_decode:,} decode")
    table.add_row("layers", f"{len(routing.n_experts)} with experts")
    table.add_row("experts", f"{n_experts} a layer, a token visits up to {top_k} of them")
    table.add_row("recur", f"{_percent(recurrence(routing))} of a token's experts in the next token")
    table.add_row("foreseen", f"{_percent(foreseen(routing))} of visits, by a look-ahead from the layer before")
    table.add_row("file", f"{file}, {size(file.stat().st_size)}")
    return table


def _percent(share: "Share | None") -> str:
    return (
        f"{share.share * 100:.1f} % (chance: {share.chance * 100:.1f} %)" if share is not None else "unknown share"
    )


Named = tuple[str, Any]
"""A name, and the prompt: text, token ids or chat messages."""

DEMO_PROMPTS: tuple[Named, ...] = (
    ("scripture", "And it came to pass"),
    ("jargon", "hacker: n. "),
    ("dictionary", "brisk: "),
    ("python", "def copytree(src, dst"),
    ("manual", "The CREATE TABLE statement"),
    ("chat", [{"role": "user", "content": "What is a kluge?"}]),
)
"""One for each kind of text the built-in demo model was trained on."""


def read_prompts(given: Sequence[str], file: Path | None, *, demo: bool) -> list[Named]:
    """Return the prompts that were given, then the file's; the demonstration's where there are none.

    One without a name has its number, from 0. Raises `ConfigError` for a file that cannot be used or if there is no
    prompt, and `PromptError` for undecodable text.
    """
    prompts: list[tuple[str | None, Any]] = [(None, prompt) for prompt in given]
    if file is not None:
        with giving("--prompts"):
            prompts += _read(file)
    if not prompts and demo and file is None:
        return list(DEMO_PROMPTS)
    if not prompts:
        raise ConfigError("there is no prompt; give --prompt TEXT, or --prompts FILE with one a line")
    named = [(str(i) if name is None else name, prompt) for i, (name, prompt) in enumerate(prompts)]
    for name, prompt in named:
        _check(name, prompt)
    return named


def _read(file: Path) -> Iterator[tuple[str | None, Any]]:
    if file.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"{file} must be a .txt file, one prompt a line, or a .jsonl file, one object a line")
    try:
        text = file.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a mark of its encoding
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a prompt may have other separators
        if line.strip():
            prompt = line.removesuffix("\r")
            yield _parse(line, f"{file}, line {number}") if file.suffix == ".jsonl" else (None, prompt)


def _parse(line: str, where: str) -> tuple[str | None, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str | list):
        raise ConfigError(f"{where} must be an object with a 'prompt': text, token ids or chat messages")
    name = value.get("name")
    if not isinstance(name, str | None):
        raise ConfigError(f"{where}: 'name' must be a text")
    return name, value["prompt"]


def _check(name: str, prompt: Any) -> None:
    try:
        f"{name}{prompt if isinstance(prompt, str) else ''}".encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"prompt {name!r} is not valid UTF-8: {error.reason}") from error
