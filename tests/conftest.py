"""What every test shares: one thread a process, a calibration of its own, and both event loops."""

import os

# Before torch is imported: tiny matrices lose by threads, and subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Most tests are about the CPU, and `device="auto"` would take a GPU. `make gpu` runs those that are about one.
if "FIDDLER_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import transformers
from transformers import PreTrainedModel

from fiddler.devices.native import native

pytest.register_assert_rewrite("tests.support.conformance")

# Machines that run tests are shared and slow at times; nothing here is about time.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds nothing but our kernels: they take seconds to compile, and are not measured."""
    folder, kernels = tmp_path_factory.getbasetemp() / "cache", native()
    if kernels is not None and kernels.library.is_file():
        (folder / "fiddler").mkdir(mode=0o700, parents=True)
        shutil.copy(kernels.library, folder / "fiddler")
    return folder


@pytest.fixture(autouse=True)
def _own_calibration(_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test measures or reads comes from the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(_cache))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[PreTrainedModel], Path]:
    """Save a model as a user would find it and return the folder."""

    def save(model: PreTrainedModel, name: str = "model") -> Path:
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was not tried: a run without a GPU must not look like one with it."""
    skipped = terminalreporter.stats.get("skipped", [])
    n = sum("nvidia" in report.keywords for report in skipped)
    if n:
        terminalreporter.write_line(f"{n} tests need an NVIDIA GPU and were skipped: `make gpu` runs them on one")
