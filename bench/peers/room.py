"""Is there room for another copy of the weights? Without asking, the system would end the bench, not the peer."""

from pathlib import Path

from bench.contest.workload import UnavailableError


def weight_bytes(folder: Path) -> int:
    """Return the size of a checkpoint's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def require(kind: str, n_bytes: float, free_bytes: int) -> None:
    """Raise `UnavailableError` where fewer than `n_bytes` are free of a kind of storage."""
    if n_bytes > free_bytes:
        raise UnavailableError(f"needs {n_bytes / 1e9:.1f} GB of {kind}, {free_bytes / 1e9:.1f} are free")
