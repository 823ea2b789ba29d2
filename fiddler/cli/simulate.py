"""`fiddler simulate`: predicts a model's speed on a described machine, in virtual time. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fiddler.cli.flags import giving
from fiddler.cli.notes import Notes
from fiddler.cli.options import choice
from fiddler.cli.terminal import guarded
from fiddler.config import EngineConfig, WaveMode
from fiddler.errors import ConfigError
from fiddler.formats.layouts import LAYOUTS
from fiddler.given import read_json
from fiddler.lab import PlannerName, PolicyName, PrefetchName
from fiddler.lab.shape import FLOATS, shapes
from fiddler.store.gguf_parts import begins_as_gguf

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

    from fiddler.cache.policy import Key
    from fiddler.lab.shape import ModelShape
    from fiddler.lab.simulation import Report, Setting
    from fiddler.lab.synthetic import SyntheticRouting
    from fiddler.lab.systems import System

SHAPE = "qwen3-30b-a3b"
"""The shape that is simulated if none was named."""
PLACEMENT = "Placement"
MOST_TOKENS = 1 << 20
"""Most tokens of made-up routing: it is held in memory, a kilobyte or two for each."""


def _machine(text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Model and machine", **limits)


def _placement(text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=PLACEMENT, **limits)


def _work(text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Work", **limits)


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Which model on which machine."""

    shape: Annotated[str | None, _machine(f"A model's shape: a name (see --list) or FILE.json; {SHAPE}.")] = None
    model: Annotated[
        Path | None,
        _machine("A checkpoint's folder: its config.json is the shape.", "--model", "-m", metavar="DIR"),
    ] = None
    quant: Annotated[
        str | None,
        _machine(f"Format of the experts, instead of the shape's own: {', '.join((FLOATS, *LAYOUTS))}."),
    ] = None
    machine: Annotated[str, _machine("A name (see --list) or FILE.json.")] = "rtx4090-desktop"
    slots: Annotated[int | None, _machine("Experts the GPU holds; what fits if left out.", min=0)] = None
    resident: Annotated[float | None, _machine("The same, as a share of all experts.", min=0.0, max=1.0)] = None
    show_list: Annotated[bool, typer.Option("--list", help="List machines and shapes, and exit.")] = False


@dataclass(frozen=True, kw_only=True)
class PlacementOptions:
    """How experts are placed; the names are those of `EngineConfig`, whose values are among these."""

    system: Annotated[
        str, _placement("Fiddler's own way or another system's; see --list. The others change parts of it.")
    ] = "fiddler"
    policy: Annotated[str | None, choice(PolicyName, "Which expert gives way.", PLACEMENT)] = None
    half_life: Annotated[float | None, _placement("Tokens after which a visit counts half, for aged-lfu.")] = None
    planner: Annotated[str | None, choice(PlannerName, "How loads are divided.", PLACEMENT)] = None
    prefetch: Annotated[str | None, choice(PrefetchName, "What is copied ahead.", PLACEMENT)] = None
    waves: Annotated[str | None, choice(WaveMode, "Whether a step is one wave or two.", PLACEMENT)] = None
    promote: Annotated[bool | None, _placement("Copy hot experts in while the link is idle.")] = None

    def chosen(self) -> "System":
        """Return the system, with the parts that the options change."""
        from fiddler.lab.systems import system

        asked = {name: value for name, value in asdict(self).items() if name != "system" and value is not None}
        with giving("--system"):
            named = system(self.system)
        return replace(named, **asked)


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """The sequences to run."""

    sequences: Annotated[int, _work("Sequences side by side.", min=1)] = 1
    prompt_tokens: Annotated[int, _work("Tokens of each prompt.", min=1)] = 128
    new_tokens: Annotated[int, _work("Tokens made for each.", min=1)] = 64
    chunk_tokens: Annotated[int, _work("Prompt tokens that may join one step.", min=1)] = (
        EngineConfig().chunk_tokens
    )
    routing: Annotated[
        str,
        _work(
            "Made up; made up to fit what is published; or drawn from a file's expert_popularity.",
            metavar="synthetic|fitted|FILE.json",
        ),
    ] = "synthetic"
    seed: Annotated[int, _work("Another seed is another routing.", min=0)] = 0

    def as_json(self) -> dict[str, Any]:
        """Return all fields."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """How the result is shown."""

    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False
    sources: Annotated[bool, typer.Option("--sources", help="Say where the machine's figures come from.")] = False
    timeline: Annotated[
        Path | None, typer.Option("--timeline", metavar="FILE.json|FILE.png", help="Write what each lane did when.")
    ] = None
    window: Annotated[
        float | None, typer.Option("--window", metavar="MS", help="Length of the picture; five layers.", min=1e-3)
    ] = None


def simulate(
    machine: MachineOptions, placement: PlacementOptions, work: WorkOptions, output: OutputOptions
) -> None:
    """Say how fast a model would be on a machine, from the machine's figures.

    Runs the engine's scheduler, cache and planner in virtual time, without the model and without the machine.
    """
    with guarded():
        from fiddler.cli import outcome, timeline

        if machine.show_list:
            outcome.print_list()
            return
        if output.timeline is not None:
            with giving("--timeline"):
                timeline.check(output.timeline)
        n_tokens = work.sequences * (work.prompt_tokens + work.new_tokens)
        check_length("--sequences times --prompt-tokens and --new-tokens", n_tokens)
        setting = _setting(machine, placement, work)
        notes = Notes(quiet=output.as_json)
        with notes.working("simulating"):
            report = _run(setting, work, traced=output.timeline is not None)
        result = outcome.Outcome(setting, work.as_json(), report)
        if output.timeline is not None and report.trace is not None:
            window_s = None if output.window is None else output.window / 1e3
            timeline.write(
                report.trace, output.timeline, result.about(), from_s=report.decodes_from_s, length_s=window_s
            )
            notes.say(f"timeline: {output.timeline}")
        if output.as_json:
            print(json.dumps(result.as_json(sources=output.sources)))
        else:
            result.print(sources=output.sources)


def _setting(options: MachineOptions, placement: PlacementOptions, work: WorkOptions) -> "Setting":
    from fiddler.lab.machine import Machine, n_slots
    from fiddler.lab.simulation import Setting

    if options.shape is not None and options.model is not None:
        raise ConfigError("--shape and --model both name the model: give one")
    with giving("--shape" if options.model is None else "--model"):
        shape = _shape(options)
    if options.quant is not None:
        shape = shape.stored_as(options.quant)
    with giving("--machine"):
        machine = Machine.load(options.machine)
    if options.slots is not None and options.resident is not None:
        raise ConfigError("--slots and --resident both say how many experts the GPU holds: give one")
    slots = options.slots
    if slots is None:
        context = work.sequences * (work.prompt_tokens + work.new_tokens)
        with giving("--sequences, --prompt-tokens or --machine"):
            slots = n_slots(shape, machine, share=options.resident, context=context)
    return Setting(
        shape=shape,
        machine=machine,
        n_slots=min(slots, shape.total_experts),
        system=placement.chosen(),
        popular=_popular(work, shape) if placement.chosen().policy == "static" else None,
        chunk_tokens=work.chunk_tokens,
    )


def _shape(options: MachineOptions) -> "ModelShape":
    from fiddler.lab.shape import ModelShape

    if options.model is None:
        return ModelShape.load(SHAPE if options.shape is None else options.shape)
    file = options.model / "config.json" if options.model.is_dir() else options.model
    if begins_as_gguf(file):
        raise ConfigError(
            f"{file} is GGUF, whose shape is not read; give the model's config.json, and --quant for its experts, "
            f"or leave --model out and give --shape: {', '.join(shapes())}"
        )
    try:
        config = read_json(file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; give a checkpoint's folder") from error
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(config, Mapping):
        raise ConfigError(f"{file}: must be a JSON object")
    announced = options.quant is None
    return ModelShape.from_config(config, file.absolute().parent.name, announced=announced)


def _run(setting: "Setting", work: WorkOptions, *, traced: bool) -> "Report":
    from fiddler.lab import simulation
    from fiddler.recording import Recording, guesses
    from fiddler.trace import Trace

    routing = make_up(work.routing, setting.shape, work.seed)
    n_tokens = work.prompt_tokens + work.new_tokens - 1  # the last token is not run
    made = [routing.sequence(i, n_tokens) for i in range(work.sequences)]
    ahead = [guesses(experts, seed=work.seed + i) for i, experts in enumerate(made)]
    sequences = [Recording(str(i), work.prompt_tokens, experts, ahead=ahead[i]) for i, experts in enumerate(made)]
    return simulation.simulate(setting, sequences, trace=Trace() if traced else None)


def _popular(work: WorkOptions, shape: "ModelShape") -> "Sequence[Key]":
    from fiddler.lab.policies import by_popularity

    return by_popularity(make_up(work.routing, shape, work.seed).profile().tolist())


def check_length(flags: str, n_tokens: int) -> None:
    """Raise `ConfigError` if there is more routing to make up than fits in memory."""
    if n_tokens > MOST_TOKENS:
        raise ConfigError(f"{flags}: {n_tokens:,} tokens are more than the {MOST_TOKENS:,} that are made up")


def make_up(routing: str, shape: "ModelShape", seed: int) -> "SyntheticRouting":
    """Return the maker of a shape's routing: "synthetic", "fitted", or drawn from the counts in a file.

    Raises `ConfigError` for a file that has no counts of this shape.
    """
    from fiddler.lab.synthetic import PUBLISHED, Habits, SyntheticRouting

    habits = {"synthetic": Habits(), "fitted": PUBLISHED}
    if routing in habits:
        return SyntheticRouting(shape.n_layers, shape.n_experts, shape.top_k, habits[routing], seed)
    with giving("--routing"):
        counts = _counts(routing, shape)
    return SyntheticRouting.counted(counts, shape.top_k, seed=seed)


def _counts(name: str, shape: "ModelShape") -> "NDArray[float64]":
    from fiddler.lab.synthetic import read_counts

    file = Path(name)
    if not file.is_file():
        raise ConfigError(
            f"unknown routing {name!r}; known: synthetic, fitted, or a JSON file with expert_popularity"
        )
    counts = read_counts(file)
    if counts.shape != (shape.n_layers, shape.n_experts):
        found, expected = (
            f"{n} layers of {e} experts" for n, e in (counts.shape, (shape.n_layers, shape.n_experts))
        )
        raise ConfigError(f"{file} has {found}, {shape.name} has {expected}")
    return counts
