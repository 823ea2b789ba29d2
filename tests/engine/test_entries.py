"""How many of our own functions a decoded layer enters: counted, for the machines that run this cannot time."""

import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import fiddler
from fiddler import DEMO, Engine, EngineConfig
from fiddler.calibration import kernels
from fiddler.devices.kernels import BUCKETS
from fiddler.devices.native import MOST_ROWS, native
from fiddler.engine.loop import EngineLoop

HOME = str(Path(fiddler.__file__).parent)
WARM, COUNTED = 24, 24
"""Steps before counting begins, and while it lasts."""


class Entries:
    """Counts, in every thread that starts while it watches, the Python functions of ours that some steps enter."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.n_steps = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(HOME):
            self.n_steps += code is EngineLoop._step.__code__
            if WARM <= self.n_steps < WARM + COUNTED:
                self.found[f"{code.co_filename[len(HOME) + 1 :]} {code.co_name}"] += 1


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    ("device", "most"), [("cpu", 60), ("sim", 250), ("sim:rtx4090-desktop", 250)], ids=lambda value: str(value)
)
async def test_a_decoded_layer_enters_few_of_our_functions(
    device: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With our own kernels, whichever a calibration of this machine would choose."""
    if native() is None:
        pytest.skip("this machine has no compiler for our kernels")
    chosen = {n: {"linear": 1.0, "native": 0.5} if n <= MOST_ROWS else {"linear": 1.0} for n in BUCKETS}
    monkeypatch.setattr(kernels, "measure", lambda key, ours: chosen)
    config = EngineConfig(device=device, calibration_dir=tmp_path)
    entries, n_tokens = Entries(), WARM + COUNTED + 8
    threading.setprofile(entries)
    try:
        async with Engine(DEMO, config) as engine:
            threading.setprofile(None)  # type: ignore[arg-type]
            thread = engine._thread
            assert thread is not None
            assert thread.loaded is not None
            n_layers = len(thread.loaded.n_experts)
            asked: Any = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False}
            await engine.generate("Once upon a time", **asked)
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
    each = {name: n / COUNTED / n_layers for name, n in entries.found.most_common()}
    listed = "\n".join(f"{n:6.2f} {name}" for name, n in each.items())
    assert sum(each.values()) <= most, f"{sum(each.values()):.1f} entries a layer:\n{listed}"
