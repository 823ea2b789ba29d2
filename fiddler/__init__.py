"""Fiddler runs Mixture-of-Experts models that do not fit in one GPU."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from fiddler.config import EngineConfig
    from fiddler.engine.attach import attach
    from fiddler.engine.engine import Engine
    from fiddler.errors import (
        CheckpointError,
        ConfigError,
        EngineClosedError,
        EngineError,
        EngineFailedError,
        FiddlerError,
        GenerationError,
        ModelError,
        PromptError,
        RequestError,
        UnsupportedModelError,
    )
    from fiddler.steps.stream import TokenStream
    from fiddler.types import DEMO, FinishReason, Result, Statistics, Timing, Token, Usage

__version__ = "0.1.0"

# Everything is imported when it is first used. Torch and transformers take seconds; and until the command line is
# imported, which comes after this, ctrl-C prints a traceback.
_LAZY = {
    "Engine": "fiddler.engine.engine",
    "TokenStream": "fiddler.steps.stream",
    "GenerationConfig": "transformers",
    "attach": "fiddler.engine.attach",
}
_QUICK = {
    "EngineConfig": "fiddler.config",
    **dict.fromkeys(("DEMO", "FinishReason", "Result", "Statistics", "Timing", "Token", "Usage"), "fiddler.types"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    place = _LAZY.get(name) or _QUICK.get(name) or "fiddler.errors"
    return getattr(import_module(place), name)


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "DEMO",
    "CheckpointError",
    "ConfigError",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineError",
    "EngineFailedError",
    "FiddlerError",
    "FinishReason",
    "GenerationConfig",
    "GenerationError",
    "ModelError",
    "PromptError",
    "RequestError",
    "Result",
    "Statistics",
    "Timing",
    "Token",
    "TokenStream",
    "UnsupportedModelError",
    "Usage",
    "attach",
]
