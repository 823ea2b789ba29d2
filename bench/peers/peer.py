"""What a peer is, and what peers share: packages that may be missing, room for another copy, the timed loop.

A peer is opened once and run on the engine's thread, in turns with Fiddler. It is fed the tokens that Fiddler made,
so all visit the same experts and read the same bytes.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from bench.workload import Run, UnavailableError, Workload

Tokens = Sequence[Sequence[int]]
"""Token ids by sequence."""
Picks = list[int]
"""The token that the peer would have next, by sequence."""


class Peer(Protocol):
    """Another system with a checkpoint's weights at hand."""

    def run(self, workload: Workload, prompts: Tokens, made: Tokens, patience_s: float) -> Run:
        """Run a workload and time it.

        `prompts` are the prompts' tokens and `made` the tokens that follow, whatever the peer itself would pick;
        with beams the peer's own search makes them. The run's `tokens` are the peer's own picks. Decoding stops
        early once it has taken `patience_s`, but not before its first step; the run says how many tokens were made.
        Raises `UnavailableError` where the peer cannot run this.
        """
        ...

    def close(self) -> None:
        """Let go of the weights."""
        ...


def installed(module: str, package: str) -> Any:
    """Return a module that not everybody has. Raises `UnavailableError` naming the package to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{package} is not installed: pip install {package}") from error


def weight_bytes(folder: Path) -> int:
    """Return the size of a checkpoint's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def require(kind: str, n_bytes: float, free_bytes: int) -> None:
    """Raise `UnavailableError` where fewer than `n_bytes` are free of a kind of storage."""
    if n_bytes > free_bytes:
        raise UnavailableError(f"needs {n_bytes / 1e9:.1f} GB of {kind}, {free_bytes / 1e9:.1f} are free")


def timed(prompt: Callable[[], Picks], step: Callable[[int], Picks], n_output: int, patience_s: float) -> Run:
    """Run `prompt`, then `step(i)` with the i-th of the tokens that were made, and time both.

    Stops after `n_output` picks, or once steps have taken `patience_s`. The first step is run whatever the
    patience: without it there is no rate.
    """
    picks, first_token_s = _timed(prompt)
    made = [picks]
    decode_s = 0.0
    while len(made) < n_output and (len(made) == 1 or decode_s < patience_s):
        picks, step_s = _timed(lambda: step(len(made) - 1))
        made.append(picks)
        decode_s += step_s
    return Run(first_token_s, decode_s, len(picks), len(made), tuple(zip(*made, strict=True)))


def _timed(work: Callable[[], Picks]) -> tuple[Picks, float]:
    started = perf_counter()
    picks = work()
    return picks, perf_counter() - started
