"""The options that commands share, in groups."""

import re
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from fiddler import DEMO
from fiddler.config import (
    COMPARED,
    DtypeName,
    EngineConfig,
    ExpertDtype,
    KernelMode,
    PlannerName,
    PolicyName,
    PrefetchMode,
    StoreMode,
    WaveMode,
)
from fiddler.errors import ConfigError
from fiddler.store.folder import find_checkpoint

DEFAULT_NEW_TOKENS = 256
"""Tokens of an answer if no length was given; fewer where the context holds no more."""


def choice(kind: Any, text: str, panel: str = "Engine", *, elsewhere: str = "") -> Any:
    """Return an option that takes one of a `Literal`'s values, or of some names, once or several times, or none.

    `elsewhere` is where other names may be given.
    """
    allowed = get_args(kind) or tuple(kind)
    known = ", ".join(allowed) + (elsewhere and f"; {elsewhere}")

    def check(given: str | list[str] | None) -> str | list[str] | None:
        for value in [given] if isinstance(given, str) else given or ():
            if value not in allowed:
                raise typer.BadParameter(f"{value!r} is not one of {known}")
        return given

    return typer.Option(help=text, metavar="|".join(allowed), callback=check, rich_help_panel=panel)


def _own(name: str, kind: Any, text: str) -> Any:
    """Return a choice of the engine's own, where `fiddler simulate` has more."""
    return choice(kind, text, elsewhere=COMPARED[name])


def _device(value: str) -> str:
    try:
        return EngineConfig(device=value).device
    except ConfigError as error:
        raise typer.BadParameter(str(error).removeprefix("device=")) from error


_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?B)?|B)?", re.IGNORECASE)


def size_bytes(text: str) -> int:
    """Return the bytes of `12GiB`, `12G` (the same), `12GB` (in powers of 1000) or a plain number of bytes.

    Raises `typer.BadParameter` for anything else, and for less than a byte.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a size such as 12GiB, 800MiB or a number of bytes")
    number, prefix, unit = found.groups()
    base = 1000 if (unit or "").upper() == "B" else 1024
    n_bytes = int(Fraction(number) * base ** " KMGT".index((prefix or " ").upper()))
    if n_bytes < 1:
        raise typer.BadParameter(f"{text!r} is less than a byte")
    return n_bytes


def _engine(text: str, **limits: Any) -> Any:
    return typer.Option(help=text, rich_help_panel="Engine", **limits)


def _sampling(text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Generation", **limits)


TRUST = "Let Python code inside the checkpoint's folder run."


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Options that name the checkpoint."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="DIR|GGUF|HUB_ID[@REVISION]",
            help="A checkpoint: a folder, a .gguf file or a hub id; the built-in demo if left out.",
        ),
    ] = None
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)] = False

    @property
    def source(self) -> str | Path:
        """The model that was named, or the demo."""
        return DEMO if self.model is None else self.model

    def find(self, *, download: bool = True) -> None:
        """Raise `ModelError` if there is no checkpoint, before torch and transformers are imported."""
        find_checkpoint(self.source, download=download)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder; else it may be downloaded, under progress bars of the hub's own."""
        return Path(self.source).is_dir()

    @property
    def name(self) -> str:
        """The model's name in messages."""
        return "the built-in demo model" if self.model is None else self.model


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the engine runs; the names are those of `EngineConfig`."""

    device: Annotated[
        str,
        _engine(
            "What experts run on beside the CPU: cuda is a GPU, sim a simulated accelerator in wall time, "
            "sim:MACHINE one in virtual time; auto is cuda where there is a GPU.",
            metavar="auto|cpu|cuda|sim|sim:MACHINE",
            callback=_device,
        ),
    ] = "auto"
    slots: Annotated[
        int | None,
        _engine("Experts the accelerator holds; a quarter of all if left out, on a GPU what fits.", min=0),
    ] = None
    vram_budget: Annotated[
        int | None,
        _engine(
            "GPU memory to take in all, such as 12GiB or 800MiB; nearly all that is free if left out.",
            metavar="SIZE",
            parser=size_bytes,
        ),
    ] = None
    policy: Annotated[str, _own("policy", PolicyName, "Which expert gives way in a full cache.")] = (
        EngineConfig().policy
    )
    half_life: Annotated[float, _engine("Tokens after which a visit counts half, for aged-lfu.", min=0.0)] = (
        EngineConfig().half_life
    )
    prefetch: Annotated[
        str,
        _own("prefetch", PrefetchMode, "Whether the next experts are guessed, and copied ahead where that pays."),
    ] = "auto"
    promote: Annotated[bool, _engine("Whether hot experts are copied in while the link is idle.")] = True
    planner: Annotated[
        str, _own("planner", PlannerName, "How a layer's experts are divided; auto is by predicted time.")
    ] = "auto"
    waves: Annotated[
        str, choice(WaveMode, "A step's rows as one wave or two; auto halves them where that should be faster.")
    ] = "auto"
    graphs: Annotated[bool, _engine("Whether a GPU's decoding steps are recorded once and replayed.")] = True
    defer: Annotated[
        int, _engine("Experts per token whose results join one layer late. Lossy: changes the output.", min=0)
    ] = 0
    warm_start: Annotated[
        Path | None,
        _engine("Where the cache's scores are kept between runs.", metavar="FILE", dir_okay=False),
    ] = None
    store: Annotated[
        str, choice(StoreMode, "Experts where they lie in the files, or each in a block of its own.")
    ] = "auto"
    dtype: Annotated[str, choice(DtypeName, "Compute type; auto is the checkpoint's own.")] = "auto"
    expert_dtype: Annotated[
        str, choice(ExpertDtype, "How experts are kept; all but checkpoint read every one into RAM at the start.")
    ] = "checkpoint"
    kernels: Annotated[
        str, choice(KernelMode, "auto is calibrated on this machine; linear repeats across machines.")
    ] = "auto"
    threads: Annotated[int | None, _engine("CPU threads.", min=1)] = None
    max_context: Annotated[int | None, _engine("Longest prompt plus completion, in tokens.", min=1)] = None
    kv_tokens: Annotated[
        int | None, _engine("Tokens whose keys and values all requests may hold together.", min=1)
    ] = None
    chunk_tokens: Annotated[int, _engine("Prompt tokens that may join one step.", min=1)] = (
        EngineConfig().chunk_tokens
    )

    def config(self, checkpoint: CheckpointOptions) -> EngineConfig:
        """Return the engine's configuration. Raises `ConfigError`."""
        return EngineConfig.from_mapping({**_fields(self), "trust_remote_code": checkpoint.trust_remote_code})


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are picked; options left out are as the checkpoint's `generation_config.json` says."""

    max_new_tokens: Annotated[
        int | None, _sampling(f"Tokens to generate at most; {DEFAULT_NEW_TOKENS} if left out.", min=1)
    ] = None
    greedy: Annotated[
        bool, _sampling("Always take the likeliest token, whatever the options below say.", "--greedy")
    ] = False
    temperature: Annotated[float | None, _sampling("Sample at this temperature; 0 is greedy.", min=0.0)] = None
    top_k: Annotated[int | None, _sampling("Sample among the K likeliest tokens.", min=1)] = None
    top_p: Annotated[
        float | None, _sampling("Sample among the likeliest tokens of this joint probability.", min=0.0, max=1.0)
    ] = None
    min_p: Annotated[
        float | None, _sampling("Drop tokens below this share of the likeliest.", min=0.0, max=1.0)
    ] = None
    repetition_penalty: Annotated[
        float | None, _sampling("Above 1, tokens that have occurred already become less likely.", min=0.0)
    ] = None
    seed: Annotated[int | None, _sampling("Sample the same tokens in every run.")] = None
    stop: Annotated[list[str], _sampling("End before this text; may be given several times.")] = field(
        default_factory=list
    )

    def overrides(self) -> dict[str, Any]:
        """Return the options that were given, as `Engine.generate_stream` names them."""
        given = {name: value for name, value in _fields(self).items() if value is not None}
        stop, greedy = given.pop("stop"), given.pop("greedy")
        return given | ({"stop_strings": stop} if stop else {}) | ({"do_sample": False} if greedy else {})


def _fields(options: Any) -> dict[str, Any]:
    return {f.name: getattr(options, f.name) for f in fields(options)}
