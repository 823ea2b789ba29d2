"""Which checkpoint a bench runs, and with what, as its command line says."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch

import fiddler
from fiddler import EngineConfig
from tools import synthesize

CACHE = Path.home() / ".cache" / "fiddler-bench"
LEAST_BYTES, MOST_BYTES = 16 << 20, 1 << 30
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
    parser.add_argument("--threads", type=int, help="CPU threads (default: what the engine chooses)")
    parser.add_argument("--calibration-dir", type=Path, help="default: where the engine keeps it")
    parser.add_argument("--set-mib", type=int, help="MiB read to find a limit (default: the model's, at most 1024)")


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


def set_bytes(options: Namespace, checkpoint: Path) -> int:
    """Return how many bytes to read to find a limit: a model that fits in the cache is read from there."""
    files = [checkpoint] if checkpoint.is_file() else checkpoint.glob("*.safetensors")
    n_bytes = sum(file.stat().st_size for file in files)
    return options.set_mib << 20 if options.set_mib else min(MOST_BYTES, max(n_bytes, LEAST_BYTES))


def config(options: Namespace, **chosen: Any) -> EngineConfig:
    """Return the engine's configuration; this process takes as many threads."""
    if options.threads:
        torch.set_num_threads(options.threads)
    return EngineConfig(threads=options.threads, calibration_dir=options.calibration_dir, **chosen)
