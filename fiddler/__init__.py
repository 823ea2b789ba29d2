"""Fiddler runs Mixture-of-Experts models that do not fit in one GPU."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiddler.config import EngineConfig
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
from fiddler.types import FinishReason, Result, Statistics, Timing, Token, Usage

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from fiddler.engine.attach import attach
    from fiddler.engine.engine import Engine
    from fiddler.engine.stream import TokenStream

__version__ = "0.1.0"

DEMO = Path(__file__).parent / "demo"
"""The built-in demo model's checkpoint folder."""

# Torch and transformers take seconds to import: what needs them is imported when it is first used.
_LAZY = {
    "Engine": "fiddler.engine.engine",
    "TokenStream": "fiddler.engine.stream",
    "GenerationConfig": "transformers",
    "attach": "fiddler.engine.attach",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


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
