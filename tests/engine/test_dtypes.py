"""Checkpoints in every dtype, computed in their own and in another."""

from pathlib import Path

import anyio
import pytest
import torch
from transformers import AutoModelForCausalLM

from fiddler import Engine, EngineConfig
from tests.support.tiny import save_tiny

PROMPT = [5, 6, 7, 8, 9]
STORED = [torch.float32, torch.bfloat16, torch.float16]


async def generate(folder: Path, config: EngineConfig) -> list[int]:
    async with Engine(folder, config) as engine:
        result = await engine.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=-1)
        return list(result.token_ids)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_in_float32_every_checkpoint_equals_transformers(kind: str, stored: torch.dtype, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, kind, dtype=stored)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    expected = reference.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=-1)
    made = anyio.run(generate, folder, EngineConfig(dtype="float32"))
    assert made == expected[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_the_checkpoints_own_dtype_is_the_default(stored: torch.dtype, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, dtype=stored)
    named = EngineConfig(dtype=str(stored).removeprefix("torch."))  # type: ignore[arg-type]
    assert anyio.run(generate, folder, EngineConfig()) == anyio.run(generate, folder, named)
