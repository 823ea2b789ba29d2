"""Every peer by its name. To add one, write its file and name it here."""

from collections.abc import Callable, Mapping
from pathlib import Path

from bench.peers import accelerate_disk, llama_cpp, transformers_experts
from bench.peers.peer import Peer

PEERS: Mapping[str, Callable[[str, Path, int], Peer]] = {
    "eager": transformers_experts.open_peer,
    "batched_mm": transformers_experts.open_peer,
    "grouped_mm": transformers_experts.open_peer,
    "accelerate-disk": accelerate_disk.open_peer,
    "llama.cpp": llama_cpp.open_peer,
}


def open_peer(name: str, folder: Path, threads: int) -> Peer:
    """Open a peer on the checkpoint in `folder`, to run with `threads` CPU threads.

    Raises `UnavailableError` where it is not installed, does not know the model, or memory has no room for it, and
    `ValueError` for a name that nobody has.
    """
    if name not in PEERS:
        raise ValueError(f"{name!r} is none of the peers: {', '.join(PEERS)}")
    return PEERS[name](name, folder, threads)
