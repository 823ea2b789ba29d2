"""Which checkpoint a bench runs, as its command line says."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import fiddler
from tools import synthesize

CACHE = Path.home() / ".cache" / "fiddler-bench"
LEAST_BYTES = 16 << 20
"""Below this, reading is timed by what a call takes."""


def add_options(parser: ArgumentParser) -> None:
    """Let a command line name a checkpoint: one of `--model`, `--synthetic` and `--demo` must be given."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a checkpoint folder")
    source.add_argument("--synthetic", help="random weights: qwen3-30b-a3b[:layers=N] or mixtral-8x7b[:layers=N]")
    source.add_argument("--demo", action="store_true", help="the demo model that ships with Fiddler")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="for synthetic checkpoints (default: %(default)s)"
    )


def folder(options: Namespace) -> Path:
    """Return the folder of the checkpoint that was named, written first if it is a synthetic one not there yet.

    Raises `ValueError` for a synthetic model that there is not.
    """
    if options.demo:
        return fiddler.DEMO
    if options.model:
        return Path(options.model)
    spec: str = options.synthetic
    return synthesize.write(synthesize.config_of(spec), options.cache / spec.replace(":", "-"))


def set_bytes(checkpoint: Path, at_most: int) -> int:
    """Return how many bytes to read to find a limit: a model that fits in the cache is read from there."""
    n_bytes = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return min(at_most, max(n_bytes, LEAST_BYTES))
