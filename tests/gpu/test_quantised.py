"""Quantised checkpoints on a real GPU: log-probabilities are those of transformers on the decoded weights."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fiddler import EngineConfig
from fiddler.config import DtypeName
from tests.engine.test_fake_gpu_quantised import FORMATS, save
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
    pair = folder(name)
    model = AutoModelForCausalLM.from_pretrained(pair.twin, dtype=getattr(torch, dtype)).eval()
    config = EngineConfig(device="cuda", dtype=dtype, kv_tokens=512, **SETTINGS[setting])
    assert await error(pair, model, config) < WITHIN[dtype]
