"""The same promises on the CPU, on simulated accelerators and on the fake GPU; tests/gpu asks a real one."""

from collections.abc import Generator
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from fiddler.gpu import cuda
from tests.support import conformance
from tests.support.conformance import Options
from tests.support.covering import covering
from tests.support.fake_gpu import FakeGpu
from tests.support.tiny import save_tiny

pytestmark = pytest.mark.anyio

COMMON: Options = {"kernels": "linear", "waves": "one"}
DEVICES: dict[str, tuple[Options, set[str]]] = {
    "cpu": ({"device": "cpu"}, {"cpu"}),
    "cpu-packed": ({"device": "cpu", "store": "packed"}, {"cpu"}),
    "sim": ({"device": "sim", "slots": 7, "planner": "all-fetch"}, {"gpu", "link"}),
    "virtual": ({"device": "sim:rtx4090-desktop", "slots": 7}, {"cpu", "gpu", "link"}),
    "cuda-none": ({"device": "cuda", "slots": 0, "kv_tokens": 256}, {"cpu", "gpu"}),
    "cuda-some": ({"device": "cuda", "slots": 7, "kv_tokens": 256, "planner": "all-fetch"}, {"gpu", "link"}),
    "cuda-eager": ({"device": "cuda", "slots": 7, "kv_tokens": 256, "graphs": False}, {"gpu", "link"}),
    "cuda-all": ({"device": "cuda", "kv_tokens": 256}, {"gpu", "link"}),
}
"""By name, an engine's options and the lanes that have something to do."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3_moe")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    return conformance.reference(model)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Generator[str]:
    with ExitStack() as stack:
        if request.param.startswith("cuda"):
            stack.enter_context(patch.object(torch.cuda, "is_available", lambda: True))
            stack.enter_context(patch.object(cuda, "open_gpu", lambda: FakeGpu(11)))
        yield request.param


BACKENDS = ("asyncio", "trio")
"""Devices lie behind the engine's thread, which knows of no event loop: each is tried with one or the other."""
on_every_device = pytest.mark.parametrize(
    ("device", "anyio_backend"), list(zip(DEVICES, cycle(BACKENDS))), indirect=["device"]
)


@pytest.mark.parametrize(
    ("check", "device", "anyio_backend"),
    covering(conformance.AGREES, DEVICES, BACKENDS),
    ids=lambda value: value.__name__ if callable(value) else value,
    indirect=["device"],
)
async def test_agrees(check: conformance.Agrees, device: str, model: Path, expected: list[list[int]]) -> None:
    await check(model, COMMON | DEVICES[device][0], expected)


@on_every_device
async def test_counts_every_visit(device: str, model: Path) -> None:
    await conformance.counts_every_visit(model, COMMON | DEVICES[device][0])


@on_every_device
async def test_records_what_it_did(device: str, model: Path) -> None:
    options, lanes = DEVICES[device]
    await conformance.records_what_it_did(model, COMMON | options, lanes)
