"""How many of our own functions a decoded layer enters: counted, for the machines that run this cannot time."""

import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import fiddler
from fiddler import DEMO, Engine, EngineConfig

HOME = str(Path(fiddler.__file__).parent)
WARM, COUNTED = 24, 24
"""Tokens before counting begins, and while it lasts."""


class Entries:
    """Counts, in every thread that starts while it watches, the Python functions of ours that are entered."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.counting = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if self.counting and event == "call" and code.co_filename.startswith(HOME):
            self.found[f"{code.co_filename[len(HOME) + 1 :]} {code.co_name}"] += 1


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    ("device", "most"), [("cpu", 60), ("sim", 250), ("sim:rtx4090-desktop", 250)], ids=lambda value: str(value)
)
async def test_a_decoded_layer_enters_few_of_our_functions(device: str, most: int) -> None:
    entries = Entries()
    threading.setprofile(entries)
    try:
        async with Engine(DEMO, EngineConfig(device=device)) as engine:
            threading.setprofile(None)  # type: ignore[arg-type]
            thread = engine._thread
            assert thread.loaded is not None
            n_layers, n_tokens, n_steps = len(thread.loaded.n_experts), 0, 0
            many = {"max_new_tokens": WARM + COUNTED + 8, "min_new_tokens": WARM + COUNTED + 8, "do_sample": False}
            async with engine.generate_stream("Once upon a time", **many) as stream:
                async for _ in stream:
                    n_tokens += 1
                    if n_tokens == WARM:
                        entries.counting, n_steps = True, engine.statistics().n_steps
                    if n_tokens == WARM + COUNTED:
                        entries.counting, n_steps = False, engine.statistics().n_steps - n_steps
                        break
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
    n_each = entries.found.total() / n_steps / n_layers
    listed = "\n".join(f"{n / n_steps / n_layers:6.2f} {name}" for name, n in entries.found.most_common(60))
    assert n_each <= most, f"{n_each:.1f} entries a layer:\n{listed}"
