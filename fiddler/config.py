"""Options of an engine, and the pure function that resolves every `"auto"`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Any, Literal, Self, get_args

from fiddler.errors import ConfigError

DeviceKind = Literal["cpu", "sim"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
KernelMode = Literal["auto", "linear"]
StoreMode = Literal["auto", "mapped", "packed"]
WaveMode = Literal["auto", "one", "two"]
PolicyName = Literal["aged-lfu", "forecast", "lfu", "lru", "layer-lru", "lfru", "hybrimoe", "static"]
PlannerName = Literal[
    "auto", "all-cpu", "all-fetch", "bandwidth-split", "cheapest-each", "cpu-or-stream", "two-ended"
]
PrefetchMode = Literal["auto", "off", "look-ahead", "transitions", "frequency", "eager", "impact"]

_CHOICES = {
    "dtype": DtypeName,
    "kernels": KernelMode,
    "store": StoreMode,
    "waves": WaveMode,
    "policy": PolicyName,
    "planner": PlannerName,
    "prefetch": PrefetchMode,
}
_AT_LEAST = {"max_running": 1, "chunk_tokens": 1, "max_context": 1, "threads": 1, "slots": 0, "defer": 0}
_FLAGS = ("promote", "trace", "record", "trust_remote_code")
_PATHS = ("warm_start", "calibration_dir")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of an engine; a frozen value.

    Raises `ConfigError` for an impossible value; `from_mapping` also for an unknown name.
    """

    device: str = "auto"
    """What experts run on beside the host's CPU: `"cpu"` is nothing else; `"sim"` a simulated accelerator in wall
    time, a second arena in RAM behind a slow link; `"sim:MACHINE"` one of the machines of `fiddler simulate`, in
    virtual time. `"auto"` is `"cpu"`."""
    dtype: DtypeName = "auto"
    """Compute type; `"auto"` is the checkpoint's own. Another type than the checkpoint's converts each expert
    once, when first used, and keeps it in memory."""
    max_running: int = 16
    """Requests that share a wave; further ones wait their turn."""
    chunk_tokens: int = 512
    """Prompt tokens that may join one step, over all requests; a longer prompt is cut into chunks."""
    max_context: int | None = None
    """Longest prompt plus completion, in tokens; `None` is the model's own limit."""
    threads: int | None = None
    """CPU threads of the engine; `None` is what torch has in the caller's thread, or one where experts are too
    small to be shared."""
    kernels: KernelMode = "auto"
    """`"auto"` picks the fastest matmul per shape and row count from a calibration stored on disk, measured once;
    `"linear"` always takes torch's `linear`, so results do not depend on the machine's calibration."""
    store: StoreMode = "auto"
    """`"mapped"` uses experts where they lie in the checkpoint's files, `"packed"` copies each into an aligned
    block of its own. `"auto"` is mapped on the CPU and packed beside an accelerator, which copies whole blocks."""
    slots: int | None = None
    """Experts the accelerator holds; `None` is a quarter of all."""
    policy: PolicyName = "forecast"
    """Which expert gives way in a full cache."""
    half_life: float = 32.0
    """Tokens after which a visit counts half, for `aged-lfu`."""
    promote: bool = True
    """Whether hot experts are copied in while the link is idle, where the policy knows how hot they are (`forecast`
    and `aged-lfu` do)."""
    planner: PlannerName = "auto"
    """How a layer's experts are divided: by predicted time; `"all-cpu"` runs every miss on the CPU, `"all-fetch"`
    copies in as many as it may; the others are rules of other systems (docs/policies.md)."""
    prefetch: PrefetchMode = "auto"
    """By what a wave's next experts are guessed and copied ahead while that pays; `"auto"` is the next layer's
    router applied to this layer's rows, or transition counts where a model does not allow that. `"eager"` and
    `"impact"` are rules of other systems."""
    waves: WaveMode = "auto"
    """Whether a step's rows travel as one wave or as two; `"auto"` halves them where that is predicted to pay. Rows
    in other company may differ in their last bits: `"one"` or `"two"` is the same on every device."""
    defer: int = 0
    """Of each token, experts of least weight whose results join one layer late. Lossy: changes the output. For
    models with at least 6 experts a token; without an accelerator it gains nothing."""
    warm_start: Path | None = None
    """File the cache's scores are read from at the start and written to at the end, beside an accelerator."""
    trace: bool = False
    """Whether to record every job and decision, for `Engine.trace()`."""
    record: bool = False
    """Whether to record which experts every token visits, for `Engine.routing()`."""
    calibration_dir: Path | None = None
    """Where calibrations are stored; `None` is `$XDG_CACHE_HOME/fiddler` or `~/.cache/fiddler`."""
    trust_remote_code: bool = False
    """Whether Python code inside the checkpoint's folder may run. Off unless asked for."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(choices):
                allowed = ", ".join(repr(c) for c in get_args(choices))
                raise ConfigError(f"{name}={value!r} is not one of {allowed}")
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be True or False")
        for name in _PATHS:
            if not isinstance(getattr(self, name), Path | None):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a pathlib.Path or None")
        if type(self.half_life) not in (int, float) or not 0 < self.half_life < inf:
            raise ConfigError(f"half_life={self.half_life!r} must be a number of tokens above 0")
        kind, colon, machine = self.device.partition(":") if isinstance(self.device, str) else ("", "", "")
        if kind not in ("auto", *get_args(DeviceKind)) or (colon and not (kind == "sim" and machine)):
            raise ConfigError(f"device={self.device!r} is not one of 'auto', 'cpu', 'sim', 'sim:MACHINE'")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Build from names and values; `ConfigError` names an unknown option and the known ones."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(f"unknown option {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**options)


@dataclass(frozen=True, slots=True)
class Resolved:
    """An `EngineConfig` in which nothing is left to be chosen."""

    device: DeviceKind
    machine: str | None
    """Of a simulated device in virtual time, the machine's name."""
    dtype: Literal["float32", "bfloat16", "float16"]
    max_context: int
    store: Literal["mapped", "packed"]


def cache_folder() -> Path:
    """Return where what is measured or compiled for this machine is kept unless told."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fiddler"


def resolve(config: EngineConfig, *, checkpoint_dtype: str, model_context: int) -> Resolved:
    """Resolve every `"auto"` against what the checkpoint says of itself.

    `model_context` is the longest context the model was made for, in tokens. Raises `ConfigError` where
    `max_context` asks for more.
    """
    dtype: Any = checkpoint_dtype if config.dtype == "auto" else config.dtype
    if dtype not in get_args(DtypeName):
        raise ConfigError(
            f"the checkpoint's dtype {dtype!r} cannot be computed with; set dtype to 'bfloat16' or 'float32'"
        )
    context = config.max_context or model_context
    if context > model_context:
        raise ConfigError(f"max_context={context} is more than the model's {model_context}")
    kind, _, machine = config.device.partition(":")
    device: DeviceKind = "sim" if kind == "sim" else "cpu"
    if device == "sim" and config.store == "mapped":
        raise ConfigError("store='mapped' has no blocks to copy in; leave store='auto' with device='sim'")
    packed = device == "sim" or config.store == "packed"
    return Resolved(device, machine or None, dtype, context, "packed" if packed else "mapped")
