"""Fiddler runs Mixture-of-Experts models that do not fit in one GPU."""

from typing import TYPE_CHECKING, Any

from fiddler import errors
from fiddler.config import EngineConfig
from fiddler.errors import *  # noqa: F403
from fiddler.types import FinishReason, Result, Statistics, Timing, Token, Usage

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from fiddler.engine.attach import attach
    from fiddler.engine.engine import Engine
    from fiddler.engine.stream import TokenStream

__version__ = "0.1.0"
