"""What a command says about its work, on stderr: stdout is for the result alone."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fiddler.types import Statistics, Timing, Usage


class Notes:
    """Writes to stderr, or nothing at all if `quiet`."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, line: str) -> None:
        """Write one line, less prominent than the result."""
        self._console.print(Text(line, style="dim"), soft_wrap=True)

    @contextmanager
    def working(self, line: str, *, spin: bool = True) -> Generator[Callable[[], None]]:
        """Show what is being done, until what the context gives is called or the context ends.

        A spinner on a terminal, unless `spin` is off because something else draws there; one plain line elsewhere.
        """
        if not (spin and self._console.is_terminal):
            self.say(f"{line} ...")
            yield lambda: None
            return
        with self._console.status(Text(f"{line} ...")) as status:
            yield status.stop

    def summary(self, usage: Usage, timing: Timing, statistics: Statistics) -> None:
        """Write what a completion took as a table."""
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim")
        table.add_row("tokens", f"{usage.prompt_tokens:,} prompt, {usage.completion_tokens:,} new")
        table.add_row("first token", f"{timing.first_token_s:.3g} s")
        if timing.tokens_per_s:
            table.add_row("speed", f"{timing.tokens_per_s:.3g} tokens/s")
        table.add_row("experts", f"CPU 100 % of {statistics.n_expert_rows:,} expert visits")
        table.add_row("weights read", weights_read(statistics))
        self._console.print()
        self._console.print(table)


def weights_read(statistics: Statistics) -> str:
    """Say how many bytes of expert weights were read, and how fast the experts' lane was."""
    read = f"{size(statistics.expert_bytes)} in {statistics.n_expert_loads:,} expert loads"
    if not statistics.expert_s:
        return read
    return f"{read}, {size(int(statistics.expert_bytes / statistics.expert_s))}/s"


def speed(timing: Timing) -> str:
    """Say a completion's length and speed in one line."""
    rate = f", {timing.tokens_per_s:.3g} tokens/s" if timing.tokens_per_s else ""
    return f"({timing.n_tokens} tokens{rate}, first after {timing.first_token_s:.3g} s)"


def size(n_bytes: int) -> str:
    """Return a number of bytes for reading, in powers of 1000."""
    return decimal(n_bytes, precision=2)
