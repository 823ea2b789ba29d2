"""Builds of our kernels, each compiled once for all files and all workers of a run."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fiddler.devices.library import compiled, keep, kept
from fiddler.devices.native import FLAGS, SOURCE, Native, native

Build = Callable[..., Native]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return a function that returns the kernels as gcc makes them with options beside our own."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # which the workers share

    def build(*options: str) -> Native:
        ours = native()
        if options or ours is None:
            return Native(_made(root / "builds", options), Path("kernels.so"))
        return ours

    return build


def _made(folder: Path, options: tuple[str, ...]) -> bytes:
    file = folder / f"{hashlib.sha256(' '.join(options).encode()).hexdigest()[:12]}.so"
    try:
        return kept(file)
    except OSError:  # the first to ask; two at once both compile, and keep the same
        made = compiled(["cc"], SOURCE, [*FLAGS, *options])
        keep(file, made)
        return made
