"""Options of an engine, and the pure function that resolves every `"auto"`."""

import atexit
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from math import inf
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

from fiddler.errors import ConfigError
from fiddler.given import flag, real_number, shown, whole_number

DeviceKind = Literal["cpu", "sim", "cuda"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
ExpertDtype = Literal["checkpoint", "bf16", "int8", "int4"]
KernelMode = Literal["auto", "linear"]
StoreMode = Literal["auto", "mapped", "packed"]
WaveMode = Literal["auto", "one", "two"]
PolicyName = Literal["forecast", "aged-lfu", "lfu", "lru"]
PlannerName = Literal["auto", "all-cpu", "all-fetch"]
PrefetchMode = Literal["auto", "off"]

_CHOICES = {
    "dtype": DtypeName,
    "expert_dtype": ExpertDtype,
    "kernels": KernelMode,
    "store": StoreMode,
    "waves": WaveMode,
    "policy": PolicyName,
    "planner": PlannerName,
    "prefetch": PrefetchMode,
}
COMPARED = {
    "policy": "fiddler simulate and fiddler replay have those of other systems",
    "planner": "fiddler simulate has those of other systems",
    "prefetch": "fiddler simulate has others, and those of other systems",
}
"""Where more can be named than an engine runs, by option."""
_AT_LEAST = {
    "max_running": 1,
    "chunk_tokens": 1,
    "max_context": 1,
    "threads": 1,
    "slots": 0,
    "vram_budget": 1,
    "kv_tokens": 1,
    "defer": 0,
}
_MAY_BE_NONE = ("max_context", "threads", "slots", "vram_budget", "kv_tokens")
_MOST = (1 << 63) - 1
_FLAGS = ("promote", "graphs", "trace", "record", "trust_remote_code")
_PATHS = ("warm_start", "calibration_dir")
_DEVICES = "'auto', 'cpu', 'cuda', 'sim', 'sim:MACHINE'"

KV_TOKENS = 32768
"""Tokens of keys and values a GPU makes room for at most, unless told. Assumed, not measured: contexts of more than
100,000 tokens are common, and room for one such request would take the memory of most slots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of an engine; a frozen value.

    Raises `ConfigError` for an impossible value; `from_mapping` also for an unknown name.
    """

    device: str = "auto"
    """The device that runs experts beside the host's CPU: `"cpu"` is none; `"cuda"` is an NVIDIA GPU, which also
    holds the dense part; `"sim"` is a simulated accelerator in wall time, a second arena in RAM behind a slow link;
    `"sim:MACHINE"` is one of the machines of `fiddler simulate`, in virtual time. `"auto"` is `"cuda"` where there
    is a GPU and `"cpu"` otherwise."""
    dtype: DtypeName = "auto"
    """Compute type; `"auto"` is the checkpoint's own. With another type each expert is converted when first used,
    and the copy is kept in memory."""
    expert_dtype: ExpertDtype = "checkpoint"
    """How experts are kept: as the checkpoint has them; quantised to `"int8"` or `"int4"` (groups of 32), which
    `fiddler quantize` does once for all; or `"bf16"`: not quantised, those that are decoded to `dtype`. All but the
    first read every expert into RAM when the engine opens."""
    max_running: int = 16
    """Most requests that run side by side; further ones wait their turn."""
    chunk_tokens: int = 512
    """Prompt tokens that may join one step, over all requests; a longer prompt is cut into chunks."""
    max_context: int | None = None
    """Longest prompt plus completion, in tokens; `None` is the model's own limit."""
    threads: int | None = None
    """CPU threads of the engine, at most `most_threads()`; `None` is the number that torch has in the caller's
    thread, or one if experts are too small to be shared."""
    kernels: KernelMode = "auto"
    """`"auto"` picks the fastest matmul per shape and row count from a calibration stored on disk, measured once;
    `"linear"` always takes torch's `linear`, so results do not depend on the machine's calibration."""
    store: StoreMode = "auto"
    """`"mapped"` uses experts where they lie in the checkpoint's files, `"packed"` copies each into an aligned
    block of its own. `"auto"` is mapped on the CPU and packed beside an accelerator, which copies whole blocks."""
    slots: int | None = None
    """Number of experts that the accelerator holds; `None` is a quarter of all, and on a GPU as many as fit."""
    vram_budget: int | None = None
    """Bytes of GPU memory the engine may take in all; `None` is all that is free when it opens, less the reserve of
    `fiddler.gpu.budget.LEFT_FREE_BYTES`. The dense part, keys and values and the workspace come first, slots get
    the rest."""
    kv_tokens: int | None = None
    """Tokens of keys and values that all running requests may hold together, prompt and longest completion of each;
    a request that finds no room waits. `None` is no limit, and on a GPU one request of `max_context` tokens, at
    most `KV_TOKENS`."""
    policy: PolicyName = "forecast"
    """Which expert gives way in a full cache: the one that is forecast to be visited least; the one with the fewest
    visits, recent ones counting more (`aged-lfu`) or all alike (`lfu`); or the one not visited for longest."""
    half_life: float = 32.0
    """Tokens after which a visit counts half, for `aged-lfu`."""
    promote: bool = True
    """Whether hot experts are copied in while the link is idle, where the policy knows how hot they are (`forecast`
    and `aged-lfu` do)."""
    planner: PlannerName = "auto"
    """How a layer's experts are divided: by predicted time; `"all-cpu"` runs every miss on the CPU, `"all-fetch"`
    copies in as many as it may."""
    prefetch: PrefetchMode = "auto"
    """Whether a wave's next experts are guessed and copied ahead while that pays: `"auto"` guesses by the next
    layer's router applied to this layer's rows, or by transition counts where a model does not allow that."""
    waves: WaveMode = "auto"
    """Whether a step's rows travel as one wave or as two; `"auto"` halves them where that is predicted to pay. Rows
    in other company may differ in their last bits: `"one"` or `"two"` is the same on every device."""
    graphs: bool = True
    """Whether decoding steps on a GPU are recorded once and replayed, where the model allows it; the log says where
    it does not."""
    defer: int = 0
    """Number of experts of least weight per token whose results join one layer late. Lossy: changes the output. For
    models with at least 6 experts a token; without an accelerator it gains nothing."""
    warm_start: Path | None = None
    """File the cache's scores are read from at the start and written to at the end, beside an accelerator. Here and
    in `calibration_dir` a `str` becomes a `Path`."""
    trace: bool = False
    """Whether to trace every job and decision in a timeline, for `Engine.trace()`."""
    record: bool = False
    """Whether to record which experts every token visits, for `Engine.routing()`."""
    calibration_dir: Path | None = None
    """Where calibrations are stored; `None` is `$XDG_CACHE_HOME/fiddler` or `~/.cache/fiddler`."""
    trust_remote_code: bool = False
    """Whether Python code inside the checkpoint's folder may run. Off unless asked for."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in get_args(choices):
                allowed = ", ".join(repr(c) for c in get_args(choices))
                where = f"; {COMPARED[name]}" if name in COMPARED else ""
                raise ConfigError(f"{name}={shown(value)} is not one of {allowed}{where}")
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            number = whole_number(value)
            if value is None and name in _MAY_BE_NONE:
                continue
            if number is None or number < least:
                raise ConfigError(f"{name}={shown(value)} must be a whole number of at least {least}")
            most, where = (most_threads(), " on this machine") if name == "threads" else (_MOST, "")
            if number > most:
                raise ConfigError(f"{name}={shown(value)} must be at most {most}{where}")
            object.__setattr__(self, name, number)
        for name in _FLAGS:
            if (on := flag(getattr(self, name))) is None:
                raise ConfigError(f"{name}={shown(getattr(self, name))} must be True or False")
            object.__setattr__(self, name, on)
        for name in _PATHS:
            object.__setattr__(self, name, _path(name, getattr(self, name)))  # frozen, but not to its maker
        half_life = real_number(self.half_life)
        if half_life is None or not 0 < half_life < inf:
            raise ConfigError(f"half_life={shown(self.half_life)} must be a number of tokens above 0, and finite")
        object.__setattr__(self, "half_life", half_life)
        self._check_device()

    def _check_device(self) -> None:
        kind, colon, machine = self.device.partition(":") if isinstance(self.device, str) else ("", "", "")
        if kind not in ("auto", *get_args(DeviceKind)) or (colon and not (kind == "sim" and machine)):
            raise ConfigError(f"device={shown(self.device)} is not one of {_DEVICES}")
        if self.vram_budget is not None and kind not in ("auto", "cuda"):
            raise ConfigError(
                f"vram_budget={self.vram_budget} is GPU memory, which device={self.device!r} does not use; "
                "leave it out, or set device='cuda'"
            )

    @property
    def asks_routers(self) -> bool:
        """Whether the prefetch mode asks routers early."""
        return self.prefetch == "auto"

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Build from names and values; `ConfigError` names an unknown option and the known ones."""
        if not isinstance(options, Mapping):
            raise ConfigError(f"options={shown(options)} must be a mapping of names to values")
        known = [f.name for f in fields(cls)]
        unknown = sorted(str(name) for name in options if name not in known)
        if unknown:
            raise ConfigError(f"unknown option {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**options)


def _path(name: str, value: Any) -> Path | None:
    """Return an option that names a file or a folder as a path, whichever way it is spelled."""
    if value is None:
        return None
    try:
        path = os.fspath(value)
    except Exception as error:  # no path, or one of a class of the caller's that raises
        raise ConfigError(f"{name}={shown(value)} must be a path (str or pathlib.Path) or None") from error
    if not isinstance(path, str) or not path or "\0" in path:
        raise ConfigError(f"{name}={shown(value)} must be a path (str or pathlib.Path) or None")
    return Path(path)


@dataclass(frozen=True, slots=True)
class Resolved:
    """An `EngineConfig` with every choice made."""

    device: DeviceKind
    machine: str | None
    """Name of the machine, for a device in virtual time."""
    dtype: Literal["float32", "bfloat16", "float16"]
    max_context: int
    store: Literal["mapped", "packed"]
    kv_tokens: int | None
    """Tokens of keys and values that all running requests may hold together; `None` is no limit."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt plus completion that can ever run."""
        return self.max_context if self.kv_tokens is None else min(self.max_context, self.kv_tokens)


@cache
def most_threads() -> int:
    """Return the most CPU threads an engine may have: OpenMP ends the process where it cannot start as many.

    Counted once: every product of our kernels uses it, and counting reads files of the system.
    """
    return max(64, 4 * (os.cpu_count() or 1))


def cache_folder() -> Path:
    """Return the folder of measurements and compiled kernels for this machine, unless another is given.

    A user without a home folder gets a temporary one for the life of the process.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "fiddler"
    except RuntimeError:  # neither $HOME nor an entry among the system's users
        return _passing_folder()


@cache
def _passing_folder() -> Path:
    from tempfile import TemporaryDirectory  # which few need, and takes a while to import

    try:
        room = TemporaryDirectory(prefix="fiddler-", ignore_cleanup_errors=True)
    except OSError:
        return Path(os.devnull) / "fiddler"  # where nothing can be kept
    atexit.register(room.cleanup)
    return Path(room.name)


def resolve(config: EngineConfig, *, checkpoint_dtype: str, model_context: int, has_cuda: bool = False) -> Resolved:
    """Resolve every `"auto"` by the checkpoint's own statements and by whether there is a GPU.

    `model_context` is the longest context the model was made for, in tokens; `has_cuda` is whether torch sees a
    CUDA device. Raises `ConfigError` where `max_context` asks for more, or `device` for a GPU that is not there.
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
    device = _device(kind, has_cuda=has_cuda)
    if device != "cpu" and config.store == "mapped":
        raise ConfigError(
            f"store='mapped' has no blocks to copy in; leave store='auto' with device={device!r}, "
            "or set device='cpu'"
        )
    converted = config.expert_dtype != "checkpoint"
    if converted and config.store == "mapped":
        raise ConfigError(
            f"store='mapped' has experts as files do; leave store='auto' with expert_dtype={config.expert_dtype!r}"
        )
    packed = device != "cpu" or config.store == "packed" or converted
    kv_tokens = config.kv_tokens or default_kv_tokens(device, context)
    return Resolved(device, machine or None, dtype, context, "packed" if packed else "mapped", kv_tokens)


def default_kv_tokens(device: DeviceKind, max_context: int) -> int | None:
    """Return the tokens of keys and values that requests may hold together unless told; `None` is no limit.

    Only a GPU has one: its memory is divided when the engine opens, where host memory grows with use.
    """
    return min(max_context, KV_TOKENS) if device == "cuda" else None


def _device(kind: str, *, has_cuda: bool) -> DeviceKind:
    if kind == "cuda" and not has_cuda:
        raise ConfigError("device='cuda': torch sees no CUDA device; set device='cpu' or device='auto'")
    if kind == "auto":
        return "cuda" if has_cuda else "cpu"
    return cast("DeviceKind", kind)  # checked when the option was given
