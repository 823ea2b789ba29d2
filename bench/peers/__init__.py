"""Other systems on the same weights, one small file each.

A peer is opened once and run on the engine's thread, in turns with Fiddler. It is fed the tokens that Fiddler made,
so all visit the same experts and read the same bytes. To add one, write its file and name it in `PEERS`.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from bench.contest.workload import Run, UnavailableError, Workload

Tokens = Sequence[Sequence[int]]
"""Token ids by sequence."""


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


PEERS: Mapping[str, str] = {
    "eager": "transformers_experts",
    "batched_mm": "transformers_experts",
    "grouped_mm": "transformers_experts",
    "accelerate-disk": "accelerate_disk",
    "llama.cpp": "llama_cpp",
}
"""The module of this package by the peer's name; several may share one."""


def open_peer(name: str, folder: Path, threads: int) -> Peer:
    """Open a peer on the checkpoint in `folder`, to run with `threads` CPU threads.

    Raises `UnavailableError` where it is not installed, does not know the model, or memory has no room for it, and
    `ValueError` for a name that nobody has.
    """
    if name not in PEERS:
        raise ValueError(f"{name!r} is none of the peers: {', '.join(PEERS)}")
    opener: Callable[[str, Path, int], Peer] = import_module(f"bench.peers.{PEERS[name]}").open_peer
    return opener(name, folder, threads)


def installed(module: str, package: str) -> Any:
    """Return a module that not everybody has. Raises `UnavailableError` naming the package to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{package} is not installed: pip install {package}") from error
