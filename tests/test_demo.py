"""The demo model that ships with the package is what its card says: small, trained, and routed by its text."""

import json

import anyio
import pytest
from transformers import AutoConfig

from fiddler import DEMO, Engine

REPORT = json.loads((DEMO / "report.json").read_text())


def test_it_is_small_and_shaped_like_qwen3_moe() -> None:
    config = AutoConfig.from_pretrained(DEMO)
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 12_000_000
    assert config.model_type == "qwen3_moe"
    assert config.num_hidden_layers >= 6
    assert config.num_experts >= 16
    assert config.num_experts_per_tok >= 2


@pytest.mark.parametrize("domain", REPORT["held_out"])
def test_it_beats_xz_on_held_out_text(domain: str) -> None:
    held_out = REPORT["held_out"][domain]
    assert held_out["bits_per_byte"] < 0.9 * held_out["xz_bits_per_byte"]


def test_it_continues_in_the_manner_of_its_prompt() -> None:
    async def complete() -> tuple[str, str]:
        async with Engine(DEMO) as engine:
            verse = await engine.generate("And the LORD said unto Moses,", max_new_tokens=24, do_sample=False)
            code = await engine.generate("    def __init__(self", max_new_tokens=24, do_sample=False)
        return verse.text, code.text

    verse, code = anyio.run(complete)
    assert any(word in verse for word in ("LORD", "thou", "unto", "thee"))
    assert "self" in code
