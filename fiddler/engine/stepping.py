"""A step as one wave or two: the same for a model's rows and for a script's."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from fiddler.engine.assemble import S, Span, halves
from fiddler.engine.runner import Runner, Wave
from fiddler.scheduler.waves import Waves

W = TypeVar("W", bound=Wave)
Make = Callable[[Sequence[Span[S]], int], W]


async def run_step(
    runner: Runner, waves: Waves, spans: Sequence[Span[S]], make: Make[S, W], *, cut: bool
) -> list[tuple[Sequence[Span[S]], W]]:
    """Run spans to the end of the model; returns each wave, which has ended, with its spans.

    `make` takes the spans of a wave, and its number in the step. `cut` allows one span to be cut in two, its later
    rows in the second wave.
    """
    n_waves = waves.choose(sum(s.n_rows for s in spans), sum(s.stop for s in spans))
    parts = halves(spans, cut=cut) if n_waves == 2 else [list(spans)]
    made = [make(part, number) for number, part in enumerate(parts)]
    started_s = runner.lanes.now_s()
    follows = len(parts) == 2 and parts[0][-1].request is parts[1][0].request
    await runner.run(made, in_order=follows)
    waves.took(len(made), runner.lanes.now_s() - started_s)
    return list(zip(parts, made, strict=True))
