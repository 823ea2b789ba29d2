"""Every error Fiddler raises on purpose.

    FiddlerError
    ├── ConfigError (ValueError)           an option is unknown or its value impossible; names the option
    ├── ModelError                         the model cannot be opened
    │   ├── CheckpointError                files missing, truncated, inconsistent or unsafe
    │   └── UnsupportedModelError          an architecture or format Fiddler does not run; says why
    ├── RequestError                       one request cannot run; the engine and the other requests go on
    │   ├── PromptError (ValueError)       empty, too long, or of the wrong kind
    │   └── GenerationError (ValueError)   a generation option is unknown or its value impossible
    └── EngineError                        the engine cannot serve
        ├── EngineClosedError              not opened yet, closed with the request in flight, or a parent process's
        └── EngineFailedError              a step failed, or the engine; `__cause__` holds the original error

Foreign errors (of safetensors, transformers, torch) are mapped where they enter: files in `store.checkpoint`, model
construction in `models.skeleton`, a caller's prompt in `text.prompts`, its reading in `text.tokenizer` and
`text.reading`, a request's options in `models.generation`, a step in `engine.loop`.
"""


class FiddlerError(Exception):
    """Root of the tree: catches everything Fiddler raises on purpose."""


class ConfigError(FiddlerError, ValueError):
    """An option of `EngineConfig` or of the command line is unknown or has an impossible value."""


class ModelError(FiddlerError):
    """The model cannot be opened."""


class CheckpointError(ModelError):
    """The checkpoint's files are missing, truncated, inconsistent or unsafe to open."""


class UnsupportedModelError(ModelError):
    """Fiddler does not run this architecture or format; the message says why."""


class RequestError(FiddlerError):
    """One request cannot run; the engine and the other requests go on."""


class PromptError(RequestError, ValueError):
    """The prompt is empty, too long, or neither text, token ids nor chat messages."""


class GenerationError(RequestError, ValueError):
    """A generation option is unknown, unsupported or has an impossible value; names the option."""


class EngineError(FiddlerError):
    """The engine cannot serve."""


class EngineClosedError(EngineError):
    """The engine was not opened yet, or it or the stream was closed while the request was in flight.

    Also raised in a forked child that uses its parent's engine.
    """


class EngineFailedError(EngineError):
    """A step failed, or the engine ended early; `__cause__` holds the original error."""
