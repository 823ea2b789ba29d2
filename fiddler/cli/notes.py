"""Writes a command's progress and summary to stderr; stdout is for the result alone."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from fiddler.types import PrefetchStatistics, Statistics, Timing, Usage


class Notes:
    """Writes to stderr, or nothing at all if `quiet`."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, line: str) -> None:
        """Write one line, less prominent than the result."""
        self._console.print(Text(line, style="dim"), soft_wrap=True)

    @contextmanager
    def working(self, line: str, *, spin: bool = True) -> Generator[Callable[[], None]]:
        """Show the work under way, until the yielded function is called or the context ends.

        A spinner on a terminal, unless `spin` is off because something else draws there; one plain line elsewhere.
        """
        if not (spin and self._console.is_terminal):
            self.say(f"{line} ...")
            yield lambda: None
            return
        with self._console.status(Text(f"{line} ...")) as status:
            yield status.stop

    @contextmanager
    def counting(self, line: str, n: int) -> Generator[Callable[[], None]]:
        """Show how many of `n` parts are done, until the context ends; call the yielded function after each part.

        A bar on a terminal; one plain line elsewhere.
        """
        if not self._console.is_terminal:
            self.say(f"{line} ...")
            yield lambda: None
            return
        with Progress(console=self._console, transient=True) as progress:
            task = progress.add_task(line, total=n)
            yield lambda: progress.advance(task)

    def summary(self, usage: Usage, timing: Timing, statistics: Statistics, machine: str | None = None) -> None:
        """Write a completion's usage and speed as a table; `machine` is the simulated one, if any."""
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim")
        table.add_row("tokens", f"{usage.prompt_tokens:,} prompt, {usage.completion_tokens:,} new")
        table.add_row("first token", f"{timing.first_token_s:.3g} s")
        if timing.tokens_per_s:
            table.add_row("speed", f"{timing.tokens_per_s:.3g} tokens/s")
        if machine is not None:
            virtual = virtual_speed(statistics.n_new_tokens, statistics.step_s)
            table.add_row("virtual speed", f"{virtual} on a simulated {machine}, prompt included")
        table.add_row("experts", where_experts_ran(statistics))
        if statistics.n_slots:
            table.add_row("slots", slots_used(statistics))
            table.add_row("prediction", f"{statistics.prediction_error * 100:.0f} % median error of a layer's time")
        table.add_row("weights read", weights_read(statistics))
        self._console.print()
        self._console.print(table)


def where_experts_ran(statistics: Statistics) -> str:
    """Say which share of the visits to experts ran where."""
    visits = f"of {statistics.n_expert_rows:,} expert visits"
    if not statistics.n_slots:
        return f"CPU 100 % {visits}"
    share = statistics.cpu.n_rows / statistics.n_expert_rows if statistics.n_expert_rows else 1.0
    return f"CPU {share * 100:.0f} %, accelerator {100 - round(share * 100)} % {visits}"


def slots_used(statistics: Statistics) -> str:
    """Say what the accelerator's slots held and how experts got there."""
    fallbacks = f", {statistics.n_fallbacks:,} fell back to the CPU" if statistics.n_fallbacks else ""
    dead = f"; dead: {', '.join(statistics.dead_lanes)}" if statistics.dead_lanes else ""
    return (
        f"{statistics.n_slots_used:,} of {statistics.n_slots:,} used; {statistics.n_hits:,} hits, "
        f"{statistics.n_fetches:,} fetches, {statistics.n_promotions:,} promotions, "
        f"{copied_ahead(statistics.prefetch)}, {size(statistics.link.n_bytes)} copied{fallbacks}{dead}"
    )


def copied_ahead(prefetch: PrefetchStatistics) -> str:
    """Say how many experts were copied ahead, and how many of them were used."""
    resting = ", now switched off: it did not pay" if prefetch.resting else ""
    return f"{prefetch.n_issued:,} ahead ({prefetch.n_used:,} used, {prefetch.n_landed:,} in time{resting})"


def weights_read(statistics: Statistics) -> str:
    """Say how many bytes of expert weights were read, and how fast the experts' lanes were."""
    read = f"{size(statistics.expert_bytes)} in {statistics.n_expert_loads:,} expert loads"
    if not statistics.expert_s:
        return read
    return f"{read}, {size(int(statistics.expert_bytes / statistics.expert_s))}/s"


def speed(timing: Timing) -> str:
    """Say a completion's length and speed in one line."""
    rate = f", {timing.tokens_per_s:.3g} tokens/s" if timing.tokens_per_s else ""
    return f"({timing.n_tokens} tokens{rate}, first after {timing.first_token_s:.3g} s)"


def virtual_speed(n_tokens: int, step_s: float) -> str:
    """Say how fast tokens came on a simulated machine's clock."""
    return f"{n_tokens / step_s if step_s else 0.0:.3g} tokens/s in virtual time"


def size(n_bytes: int) -> str:
    """Return a number of bytes for reading, in powers of 1000."""
    return decimal(n_bytes, precision=2)
