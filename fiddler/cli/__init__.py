"""The command line: `fiddler generate`, `chat`, `inspect`, `quantize`, `simulate`, `replay`, `record`, `calibrate`.

Importing this imports next to nothing: ctrl-C has its handler before anything that takes long is imported.
"""

import os
import signal
from typing import Any


class CommandLine:
    """The program. A call runs a whole process; attributes are those of the typer application."""

    def __call__(self, *arguments: Any, **options: Any) -> None:
        """Run the command in the arguments, and exit."""
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))  # there is nothing to end yet
        from fiddler.cli.terminal import as_process

        with as_process():
            self._application(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._application, name)

    @property
    def _application(self) -> Any:
        from fiddler.cli.commands import application

        return application


app = CommandLine()
__all__ = ["app"]
