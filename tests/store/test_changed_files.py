"""A checkpoint's files change while they are open: no dead process, no token of changed weights, no descriptor."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
import torch
from transformers import AutoModelForCausalLM

from fiddler import CheckpointError, Engine, EngineConfig, EngineFailedError, attach
from fiddler.models.loaded import load
from fiddler.store import sigbus
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.folder import SINGLE
from tests.support.tiny import save_tiny

PROMPT = list(range(10, 40))
Change = Callable[[Path], None]


def overwrite(file: Path) -> None:
    """Write other numbers into the second half, as a download of another version would."""
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(bytes(1000))


def rewrite(file: Path) -> None:
    """Truncate it and write it anew, of the same size."""
    content = file.read_bytes()
    file.write_bytes(content)


def grow(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"more")


CHANGES: tuple[Change, ...] = (overwrite, rewrite, grow)


def replace(file: Path) -> None:
    (file.parent / "new").write_bytes(b"nothing like it")
    (file.parent / "new").replace(file)


def link(file: Path) -> None:
    (file.parent / "old").hardlink_to(file)
    file.unlink()
    file.symlink_to("nothing")


HARMLESS: tuple[Change, ...] = (replace, Path.unlink, link, lambda file: file.chmod(0o400))


@pytest.fixture
def anyio_backend() -> str:
    """The caller's loop makes no difference to what files do behind it."""
    return "trio"


@pytest.mark.anyio
@pytest.mark.parametrize("change", CHANGES)
async def test_a_request_that_runs_fails_and_says_why(tmp_path: Path, change: Change) -> None:
    folder = save_tiny(tmp_path)
    with anyio.fail_after(30):
        async with Engine(folder, EngineConfig(dtype="bfloat16")) as engine:
            stream = engine.generate_stream(PROMPT, max_new_tokens=400, do_sample=False)
            await anext(stream)
            change(folder / SINGLE)
            with pytest.raises(
                EngineFailedError, match=r"model\.safetensors was changed while it was open"
            ) as found:
                async for _ in stream:
                    pass
            assert isinstance(found.value.__cause__, CheckpointError)
            with pytest.raises(EngineFailedError, match="open the model again"):  # and it stays that way
                await engine.generate(PROMPT, max_new_tokens=2)


@pytest.mark.anyio
@pytest.mark.parametrize("change", HARMLESS, ids=["replaced", "deleted", "became a link", "mode"])
async def test_what_is_mapped_stays_where_only_its_name_changes(tmp_path: Path, change: Change) -> None:
    folder = save_tiny(tmp_path, dtype=torch.bfloat16)
    with anyio.fail_after(30):
        async with Engine(folder) as engine:
            expected = await engine.generate(PROMPT, max_new_tokens=8, do_sample=False)
            change(folder / SINGLE)
            found = await engine.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert found.token_ids == expected.token_ids


@pytest.mark.anyio
async def test_a_packed_store_needs_its_files_no_more(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    with anyio.fail_after(30):
        async with Engine(folder, EngineConfig(store="packed")) as engine:
            expected = await engine.generate(PROMPT, max_new_tokens=8, do_sample=False)
            (folder / SINGLE).write_bytes(b"")
            found = await engine.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert found.token_ids == expected.token_ids


def test_the_dense_part_is_read_when_it_is_opened(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(folder).model.embed_tokens.weight.clone()
    loaded = load(folder, EngineConfig())
    (folder / SINGLE).write_bytes(b"\0" * (folder / SINGLE).stat().st_size)
    assert torch.equal(loaded.model.get_input_embeddings().weight, expected)
    loaded.model.get_input_embeddings().weight.zero_()  # it may be written to


def test_under_plain_transformers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    model = attach(folder)
    model(torch.tensor([PROMPT]))
    overwrite(folder / SINGLE)
    with pytest.raises(CheckpointError, match="was changed while it was open"):
        model(torch.tensor([PROMPT]))


def test_a_name_that_is_relative_stays_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint.open(Path("here"))
    monkeypatch.chdir("/")
    checkpoint.check()
    overwrite(tmp_path / "here" / SINGLE)
    with pytest.raises(CheckpointError, match="was changed"):
        checkpoint.check()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody says where a mapped file went")
def test_a_file_that_has_moved_is_watched(tmp_path: Path) -> None:
    file, moved = save_tiny(tmp_path) / SINGLE, tmp_path / "moved"
    checkpoint = Checkpoint.open(tmp_path)
    file.rename(moved)
    checkpoint.check()
    file.write_bytes(b"another one")
    checkpoint.check()
    overwrite(moved)
    with pytest.raises(CheckpointError, match="was changed"):
        checkpoint.check()


class TestDescriptors:
    def test_none_is_held(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path, max_shard_size="20KB")
        load(folder, EngineConfig())  # what is imported or made once may hold some
        before = os.listdir("/proc/self/fd")  # noqa: PTH208  # of a folder that changes
        loaded = load(folder, EngineConfig())
        loaded.weights(2, 7)
        assert len(os.listdir("/proc/self/fd")) == len(before)  # noqa: PTH208

    def test_more_shards_than_descriptors(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path, max_shard_size="1KB")
        n_shards = len(list(folder.glob("*.safetensors")))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        few = len(os.listdir("/proc/self/fd")) + 15  # noqa: PTH208
        assert n_shards > 15
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
        try:
            loaded = load(folder, EngineConfig())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert loaded.weights(2, 7).down.shape == (64, 32)

    def test_memory_goes_with_the_last_tensor(self, tmp_path: Path) -> None:
        file = save_tiny(tmp_path) / SINGLE
        checkpoint = Checkpoint.open(tmp_path)
        tensor = checkpoint.tensor("model.norm.weight")
        del checkpoint
        assert str(file) in Path("/proc/self/maps").read_text()
        assert torch.isfinite(tensor).all()
        del tensor
        assert str(file) not in Path("/proc/self/maps").read_text()


TRUNCATED = """
import faulthandler, os, sys
from pathlib import Path
import anyio, torch
from fiddler import Engine, EngineConfig, FiddlerError

faulthandler.enable()  # a handler that was there before
folder, name, at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
file = folder / "model.safetensors"

def truncate():
    if name == "moved":
        file.rename(folder / "moved")
    os.truncate(folder / "moved" if name == "moved" else file, at)

async def main():
    async with Engine(folder, EngineConfig(threads=2, kernels=sys.argv[4])) as engine:
        stream = engine.generate_stream(list(range(10, 40)), max_new_tokens=400, do_sample=False)
        n = 0
        try:
            async for _ in stream:
                n += 1
                if n == 3:
                    truncate()
        except FiddlerError as error:
            print(type(error).__name__, n < 400, error)
        try:
            await engine.generate(list(range(40, 200)), max_new_tokens=2)
        except FiddlerError as error:
            print(type(error).__name__, error)

anyio.run(main)
print("closed")
"""


@pytest.mark.skipif(not sigbus.SUPPORTED, reason="the signal is handled on Linux only")
@pytest.mark.parametrize(
    ("name", "at", "kernels"), [("kept", 0, "linear"), ("moved", 0, "linear"), ("moved", 4096, "auto")]
)
def test_truncating_a_file_kills_nobody(tmp_path: Path, name: str, at: int, kernels: str) -> None:
    # bfloat16: no expert is copied, and all are read from the file.
    folder = save_tiny(tmp_path, dtype=torch.bfloat16, hidden_size=256)
    ran = subprocess.run(
        [sys.executable, "-c", TRUNCATED, str(folder), name, str(at), kernels],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    first, second, last = ran.stdout.splitlines()
    assert first.startswith("EngineFailedError True a step failed: CheckpointError")
    assert second.startswith("EngineFailedError a step failed: CheckpointError")
    assert "while it was open; open the model again" in first
    assert last == "closed"


ELSEWHERE = """
import faulthandler, mmap, sys
import torch
from pathlib import Path
from fiddler.store.checkpoint import Checkpoint

faulthandler.enable()
checkpoint = Checkpoint.open(Path(sys.argv[1]))
with open(sys.argv[2], "r+b") as stream:
    mapped = mmap.mmap(stream.fileno(), 0)
    stream.truncate(0)
mapped[0]
"""


@pytest.mark.skipif(not sigbus.SUPPORTED, reason="the signal is handled on Linux only")
def test_a_fault_in_other_memory_goes_to_the_handler_before(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(10_000))
    ran = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(save_tiny(tmp_path)), str(tmp_path / "other")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == -7
    assert "Fatal Python error: Bus error" in ran.stderr
