"""Options of an engine, and the pure function that resolves every `"auto"`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from fiddler.errors import ConfigError

DeviceName = Literal["auto", "cpu"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
KernelMode = Literal["auto", "linear"]

_CHOICES = {"device": DeviceName, "dtype": DtypeName, "kernels": KernelMode}
_AT_LEAST_ONE = ("max_running", "chunk_tokens", "max_context", "threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of an engine; a frozen value.

    Raises `ConfigError` for an impossible value; `from_mapping` also for an unknown name.
    """

    device: DeviceName = "auto"
    """Where the dense part runs. `"auto"` is the CPU."""
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
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")

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

    device: Literal["cpu"]
    dtype: Literal["float32", "bfloat16", "float16"]
    max_context: int


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
    return Resolved(device="cpu", dtype=dtype, max_context=context)
