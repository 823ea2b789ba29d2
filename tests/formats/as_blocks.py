"""A tiny checkpoint of bytes, read as random blocks of GGUF's: whole engines of every type, without its files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fiddler.formats.integers import Integers
from fiddler.formats.packed import Code, Packed
from fiddler.formats.quantised import Files
from tests.formats.blocks import in_blocks
from tests.formats.folders import Pair, save_pair
from tests.formats.test_compressed import scheme
from tests.formats.writers import Written, integers

SIZES = {"hidden_size": 256, "moe_intermediate_size": 256}
"""That large blocks fill."""
SIZE = 0.1
"""Of the numbers, roughly."""


def save_bytes(folder: Path, code: Code) -> Pair:
    """Write a checkpoint, and a twin of the numbers that it has once `read_as_blocks` was called."""
    write_bytes = integers(8, 0)

    def write(w: Tensor) -> Written:
        parts, numbers = write_bytes(w)
        made = stand_in(code, parts["weight_packed"], (w.shape[0], w.shape[1]))
        return parts, numbers if made is None else made.dense(w.dtype)

    return save_pair(folder, "qwen3_moe", write, scheme(8), **SIZES)


def read_as_blocks(monkeypatch: pytest.MonkeyPatch, code: Code) -> None:
    """Read bytes of `pack-quantized` as blocks wherever these fill the rows."""
    own = Integers.read

    def read(self: Integers, files: Files, index: int | None) -> tuple[Packed, ...]:
        return tuple(stand_in(code, each.codes, each.shape) or each for each in own(self, files, index))

    monkeypatch.setattr(Integers, "read", read)


def stand_in(code: Code, codes: Tensor, shape: tuple[int, int]) -> Packed | None:
    """Return blocks of a shape, the same ones for the same bytes; `None` where they do not fill its rows."""
    assert code.run is not None
    if shape[1] % code.run.columns:
        return None
    return replace(in_blocks(code, shape, seed=int(codes.view(torch.uint8).sum())), factor=SIZE)
