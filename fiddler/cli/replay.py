"""`fiddler replay`: compares cache policies on a routing with the best that is possible. Uses no torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from fiddler.cli.flags import giving
from fiddler.cli.notes import Notes
from fiddler.cli.options import choice
from fiddler.cli.simulate import SHAPE, check_length, make_up
from fiddler.cli.terminal import guarded
from fiddler.config import EngineConfig
from fiddler.errors import ConfigError
from fiddler.lab import PolicyName

if TYPE_CHECKING:
    from fiddler.cli.curves import Replayed
    from fiddler.lab.replay import MakePolicy
    from fiddler.recording import RoutingTrace

RESIDENT = (0.125, 0.25, 0.5)
"""Shares of experts with a slot, unless given."""


def _routing(text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Made-up routing", **limits)


def _cache(text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Cache", **limits)


@dataclass(frozen=True, kw_only=True)
class RoutingOptions:
    """Which routing is replayed."""

    traces: Annotated[
        list[Path],
        typer.Argument(
            metavar="ROUTING.safetensors",
            help="Routing that `fiddler record` wrote; each file is replayed by itself. Made up if left out.",
            show_default=False,
        ),
    ] = field(default_factory=list)
    names: Annotated[
        str | None,
        typer.Option(
            "--names", metavar="PATTERN", help="Of the sequences recorded, only those so named: 'chat/*'."
        ),
    ] = None
    shape: Annotated[str | None, _routing(f"Of a model: a name or FILE.json; {SHAPE}.")] = None
    tokens: Annotated[int | None, _routing("Length of its one sequence, all of it made; 256.", min=1)] = None
    seed: Annotated[int | None, _routing("Another seed is another routing; 0.", min=0)] = None
    routing: Annotated[
        str | None, _routing("Drawn from the visits counted in a file.", metavar="synthetic|FILE.json")
    ] = None


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The caches it is replayed through."""

    policy: Annotated[
        list[str], choice(PolicyName, "Which expert gives way; may be given several times. All.", "Cache")
    ] = field(default_factory=list)
    resident: Annotated[
        list[float],
        _cache("Share of the experts that has a slot; may be given several times.", min=0.0, max=1.0),
    ] = field(default_factory=lambda: list(RESIDENT))
    half_life: Annotated[float, _cache("Tokens after which a visit counts half, where counts age.")] = (
        EngineConfig().half_life
    )
    chunk_tokens: Annotated[int, _cache("Prompt tokens that pass the model together.", min=1)] = (
        EngineConfig().chunk_tokens
    )


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """How the result is shown."""

    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png|FILE.svg", help="Draw reads over Belady's by size.")
    ] = None


def replay(routing: RoutingOptions, cache: CacheOptions, output: ReplayOptions) -> None:
    """Compare cache policies on one routing, and with the best policy possible.

    The sequences of a file run one after the other through one cache, which
    carries over as in a server. "belady" knows all that comes, and no policy
    reads less; "foresight N" knows the next N tokens.
    """
    with guarded():
        from fiddler.cli import curves
        from fiddler.cli import curves as replayed

        if output.plot is not None:
            with giving("--plot"):
                curves.check(output.plot)
        _check(cache)
        traces = _recorded(routing) if routing.traces else [_made_up(routing)]
        notes = Notes(quiet=output.as_json)
        results = replays(traces, cache, notes)
        if output.plot is not None:
            curves.write(results, output.plot)
            notes.say(f"plot: {output.plot}")
        if output.as_json:
            print(json.dumps({"half_life": cache.half_life, "traces": [result.as_json() for result in results]}))
        else:
            replayed.print_tables(results)


def _check(options: CacheOptions) -> None:
    """Raise `ConfigError` for an impossible policy before anything runs."""
    for make in _policies(options, (1,), 1).values():
        make()


def _policies(options: CacheOptions, n_experts: tuple[int, ...], top_k: int) -> "dict[str, MakePolicy]":
    from functools import partial

    from fiddler.lab.policies import make_policy

    make = partial(make_policy, n_experts=n_experts, half_life=options.half_life, top_k=top_k)
    return {name: partial(make, name) for name in options.policy or get_args(PolicyName)}


def _recorded(options: RoutingOptions) -> "list[tuple[str, RoutingTrace]]":
    from fiddler.lab.traces import load

    given = (options.shape, options.tokens, options.seed, options.routing)
    if any(value is not None for value in given):
        raise ConfigError("--shape, --tokens, --seed and --routing make routing up: leave them or the files out")
    return [(file.name, _named(load(file), file, options.names)) for file in options.traces]


def _named(trace: "RoutingTrace", file: Path, pattern: str | None) -> "RoutingTrace":
    chosen = tuple(r for r in trace.recordings if pattern is None or fnmatchcase(r.name, pattern))
    if not sum(len(recording.experts) for recording in chosen):
        raise ConfigError(f"{file}: no tokens of a sequence that --names {pattern or '*'!r} chooses")
    return replace(trace, recordings=chosen)


def _made_up(options: RoutingOptions) -> "tuple[str, RoutingTrace]":
    from fiddler.lab.shape import ModelShape
    from fiddler.recording import Recording, RoutingTrace

    if options.names is not None:
        raise ConfigError("--names chooses from recorded routing: give a file")
    n_tokens = 256 if options.tokens is None else options.tokens
    check_length("--tokens", n_tokens)
    with giving("--shape"):
        shape = ModelShape.load(SHAPE if options.shape is None else options.shape)
    routing, seed = "synthetic" if options.routing is None else options.routing, options.seed or 0
    experts = make_up(routing, shape, seed).sequence(0, n_tokens)
    name = f"{Path(routing).stem}, seed {seed}"
    n_experts = (shape.n_experts,) * shape.n_layers
    return name, RoutingTrace(shape.name, n_experts, (Recording(name, 0, experts),))


def replays(traces: "Sequence[tuple[str, RoutingTrace]]", options: CacheOptions, notes: Notes) -> "list[Replayed]":
    """Replay each routing, whose name stands before it, with every policy and size of the options."""
    from fiddler.cli.curves import Replayed
    from fiddler.lab.replay import BOUNDS, compare
    from fiddler.recording import visits

    shares = sorted(set(options.resident))
    results = []
    n_policies = len(BOUNDS) + len(_policies(options, (1,), 1))
    with notes.counting("replaying", len(traces) * len(shares) * n_policies) as done:
        for name, trace in traces:
            sizes = {round(share * sum(trace.n_experts)): share for share in shares}
            policies = _policies(options, trace.n_experts, trace.recordings[0].experts.shape[2])
            scores = []
            for score in compare(list(visits(trace.recordings, options.chunk_tokens)), policies, list(sizes)):
                scores.append(score)
                done()
            results.append(Replayed(name, trace, sizes, tuple(scores)))
    return results
