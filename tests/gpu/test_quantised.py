"""Quantised checkpoints on a real GPU: log-probabilities are those of transformers on the decoded weights."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fiddler import EngineConfig
from fiddler.config import DtypeName
from fiddler.formats.packed import Code
from tests.engine.test_fake_gpu_quantised import FORMATS, save
from tests.formats.as_blocks import read_as_blocks, save_bytes
from tests.formats.blocks import RUNS
from tests.formats.folders import WITHIN, Pair, error

pytestmark = [pytest.mark.anyio, pytest.mark.nvidia]

SETTINGS: dict[str, dict[str, Any]] = {
    "no-slots": {"slots": 0},
    "some-slots": {"slots": 7},
    "every-expert": {},
    "every-expert-eager": {"graphs": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    return cache(lambda name: save(tmp_path_factory.mktemp(name), name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("name", [*FORMATS, "gpt_oss"])
async def test_values_are_those_of_transformers(
    folder: Callable[[str], Pair], name: str, setting: str, dtype: DtypeName
) -> None:
    await agrees(folder(name), setting, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("code", RUNS, ids=lambda code: code.value)
async def test_values_of_blocks_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: Code, setting: str, dtype: DtypeName
) -> None:
    read_as_blocks(monkeypatch, code)
    await agrees(save_bytes(tmp_path, code), setting, dtype)


async def agrees(pair: Pair, setting: str, dtype: DtypeName) -> None:
    """Hold an engine on the GPU against transformers on the twin."""
    model = AutoModelForCausalLM.from_pretrained(pair.twin, dtype=getattr(torch, dtype)).eval()
    config = EngineConfig(device="cuda", dtype=dtype, kv_tokens=512, **SETTINGS[setting])
    assert await error(pair, model, config) < WITHIN[dtype]
