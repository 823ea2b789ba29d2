"""A checkpoint folder: what is refused, and that what is opened is only mapped."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fiddler.config import EngineConfig
from fiddler.errors import CheckpointError
from fiddler.models.loaded import load
from fiddler.store import checkpoint
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.folder import INDEX, SINGLE
from fiddler.store.mapped import MappedStore
from tests.support.tiny import save_tiny

MIB = 1 << 20


def save_single(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / SINGLE)
    return folder


def save_sharded(folder: Path, shards: dict[str, dict[str, Tensor]]) -> Path:
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    return save_index(folder, {tensor: name for name, tensors in shards.items() for tensor in tensors})


def save_index(folder: Path, weight_map: object) -> Path:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def mapped_kib(file: Path, field: str = "Rss") -> int:
    """Sum a field of `/proc/self/smaps` over the mappings of `file`; -1 where it is not mapped."""
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    ours = [block for block in blocks if str(file) in block.partition("\n")[0]]
    sizes = [int(size) for block in ours for size in re.findall(rf"^{field}:\s+(\d+) kB", block, re.MULTILINE)]
    return sum(sizes) if ours else -1


class TestRefused:
    def test_missing_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="nowhere is not a folder"):
            Checkpoint.open(tmp_path / "nowhere")

    def test_file_in_place_of_a_folder(self, tmp_path: Path) -> None:
        save_single(tmp_path, {"a": torch.ones(2)})
        with pytest.raises(CheckpointError, match="is not a folder"):
            Checkpoint.open(tmp_path / SINGLE)

    def test_empty_folder_is_told_what_it_lacks(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=f"neither {SINGLE} nor {INDEX}"):
            Checkpoint.open(tmp_path)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
    def test_pickled_weights_are_never_opened(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(pickle.dumps(Tripwire(tmp_path / "opened")))
        with pytest.raises(CheckpointError, match="pickled weights, which are never opened"):
            Checkpoint.open(tmp_path)
        assert not (tmp_path / "opened").exists()

    @pytest.mark.parametrize("n_left", [0, 4, 8, 20, 100, -1])
    def test_truncated_file(self, tmp_path: Path, n_left: int) -> None:
        save_single(tmp_path, {"a": torch.ones(64, 64)})
        file = tmp_path / SINGLE
        file.write_bytes(file.read_bytes()[:n_left])
        with pytest.raises(CheckpointError, match=rf"{SINGLE} is truncated or not safetensors.*download it again"):
            Checkpoint.open(tmp_path)

    def test_truncated_shard_is_named(self, tmp_path: Path) -> None:
        save_sharded(tmp_path, {"one.safetensors": {"a": torch.ones(9)}, "two.safetensors": {"b": torch.ones(9)}})
        file = tmp_path / "two.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=r"two\.safetensors is truncated"):
            Checkpoint.open(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            b"not safetensors at all, just text",
            (1 << 62).to_bytes(8, "little") + b"{}",
            (8).to_bytes(8, "little") + b"{broken}",
            (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc",
            (2).to_bytes(8, "little") + b"[]",
        ],
        ids=["text", "endless header", "not json", "not utf-8", "not an object"],
    )
    def test_garbage_header(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / SINGLE).write_bytes(content)
        with pytest.raises(CheckpointError, match="is truncated or not safetensors"):
            Checkpoint.open(tmp_path)

    def test_data_offsets_beyond_the_file(self, tmp_path: Path) -> None:
        header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [1000, 1016]}}).encode()
        (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
        with pytest.raises(CheckpointError, match="is truncated or not safetensors"):
            Checkpoint.open(tmp_path)


class TestReplacedWhileOpened:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        shards = {f"{name}.safetensors": {name: torch.ones(9)} for name in ("one", "two")}
        return save_sharded(tmp_path, shards)

    def replacing(self, name: str, change: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch) -> None:
        """Change a file once the first one is open."""

        def open_and_change(file: Path) -> Any:
            opened = opening(file)
            if file.name == "one.safetensors":
                change(file.with_name(name))
            return opened

        opening = checkpoint._open
        monkeypatch.setattr(checkpoint, "_open", open_and_change)

    @pytest.mark.parametrize(
        "change", [Path.unlink, lambda file: shutil.copy(file, "x") and Path("x").replace(file)]
    )
    def test_by_another_file(
        self, folder: Path, change: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder)
        self.replacing("one.safetensors", change, monkeypatch)
        with pytest.raises(CheckpointError, match=r"one\.safetensors was replaced while it was opened; open"):
            Checkpoint.open(folder)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such pipes")
    def test_by_a_pipe_that_nobody_writes_to(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replacing("two.safetensors", lambda file: (file.unlink(), os.mkfifo(file)), monkeypatch)
        with pytest.raises(CheckpointError, match=r"two\.safetensors is not a regular file"):
            Checkpoint.open(folder)


class TestRefusedIndex:
    def test_missing_shard_is_named_and_counted(self, tmp_path: Path) -> None:
        save_sharded(tmp_path, {"one.safetensors": {"a": torch.ones(9)}, "two.safetensors": {"b": torch.ones(9)}})
        (tmp_path / "two.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"lacks 1 of 2 files, first two\.safetensors"):
            Checkpoint.open(tmp_path)

    def test_a_name_that_no_file_can_have(self, tmp_path: Path) -> None:
        save_index(tmp_path, {"a": "x" * 5000 + ".safetensors"})
        with pytest.raises(CheckpointError, match=r"lacks 1 of 1 files, first x+\.safetensors"):
            Checkpoint.open(tmp_path)

    def test_tensor_its_shard_lacks_is_named(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(9)}, tmp_path / "one.safetensors")
        save_index(tmp_path, {"a": "one.safetensors", "lost": "one.safetensors"})
        with pytest.raises(CheckpointError, match=r"one\.safetensors lacks 'lost'"):
            Checkpoint.open(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            *("", "{", "[]", "null", "3", "{}"),
            *('{"weight_map": []}', '{"weight_map": null}', '{"weight_map": "a"}'),
            "[" * 100_000,
        ],
        ids=lambda content: content[:30],
    )
    def test_not_an_index(self, tmp_path: Path, content: str) -> None:
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(CheckpointError, match=f"{INDEX} is not a valid index"):
            Checkpoint.open(tmp_path)

    def test_index_that_is_not_text(self, tmp_path: Path) -> None:
        (tmp_path / INDEX).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(CheckpointError, match="is not a valid index"):
            Checkpoint.open(tmp_path)

    @pytest.mark.parametrize("value", [3, None, ["one.safetensors"], {"file": "one.safetensors"}])
    def test_shard_that_is_not_a_name(self, tmp_path: Path, value: object) -> None:
        save_index(tmp_path, {"a": value})
        with pytest.raises(CheckpointError, match="is not a safetensors file inside"):
            Checkpoint.open(tmp_path)

    @pytest.mark.parametrize("name", ["../x.safetensors", "sub/../../x.safetensors", "{parent}/x.safetensors"])
    def test_file_outside_the_folder_is_refused_though_it_exists(self, tmp_path: Path, name: str) -> None:
        save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
        folder = tmp_path / "model"
        (folder / "sub").mkdir(parents=True)
        save_index(folder, {"a": name.format(parent=tmp_path)})
        with pytest.raises(CheckpointError, match="is not a safetensors file inside"):
            Checkpoint.open(folder)

    def test_pickle_named_by_the_index(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Tripwire(tmp_path / "opened")))
        save_index(tmp_path, {"a": "pytorch_model.bin"})
        with pytest.raises(CheckpointError, match="is not a safetensors file inside"):
            Checkpoint.open(tmp_path)
        assert not (tmp_path / "opened").exists()


class Tripwire:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_the_tripwire_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Tripwire(tmp_path / "opened")))
    assert (tmp_path / "opened").exists()


class TestTensors:
    @given(
        shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4),
        dtypes=st.lists(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), min_size=4, max_size=4),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=60, deadline=None)
    def test_equal_what_safetensors_loads(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        shapes: list[list[int]],
        dtypes: list[torch.dtype],
        seed: int,
    ) -> None:
        folder = tmp_path_factory.mktemp("checkpoint")
        random = torch.Generator().manual_seed(seed)
        saved = {
            f"t{i}": torch.randn(shape, generator=random).to(dtype)
            for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
        }
        checkpoint = Checkpoint.open(save_single(folder, saved))
        loaded = load_file(folder / SINGLE)
        assert set(checkpoint.entries) == set(loaded)
        for name, expected in loaded.items():
            tensor = checkpoint.tensor(name)
            assert tensor.dtype == expected.dtype
            assert tensor.is_contiguous()
            assert torch.equal(tensor, expected)

    def test_of_every_shard_are_there(self, tmp_path: Path) -> None:
        shards = {"one.safetensors": {"a": torch.rand(3)}, "sub/two.safetensors": {"b": torch.rand(2, 2)}}
        (tmp_path / "sub").mkdir()
        checkpoint = Checkpoint.open(save_sharded(tmp_path, shards))
        assert torch.equal(checkpoint.tensor("a"), shards["one.safetensors"]["a"])
        assert torch.equal(checkpoint.tensor("b"), shards["sub/two.safetensors"]["b"])

    def test_unknown_name_is_an_error_of_ours(self, tmp_path: Path) -> None:
        checkpoint = Checkpoint.open(save_single(tmp_path, {"a": torch.ones(2)}))
        with pytest.raises(CheckpointError, match="'b' is not in"):
            checkpoint.tensor("b")

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool])
    def test_of_any_dtype_that_torch_has(self, tmp_path: Path, dtype: torch.dtype) -> None:
        save_single(tmp_path, {"strange": torch.ones(3).to(dtype)})
        assert Checkpoint.open(tmp_path).tensor("strange").float().tolist() == [1, 1, 1]

    @pytest.mark.parametrize("n_more", range(1, 8))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_at_an_odd_byte_are_copied(self, tmp_path: Path, n_more: int, dtype: torch.dtype) -> None:
        shapes = {"a": (3, 2, 4), "b": (2, 4), "c": (2, 4)}
        saved = {name: torch.rand(shape).to(dtype) for name, shape in shapes.items()}
        shift(save_single(tmp_path, saved) / SINGLE, n_more)
        checkpoint = Checkpoint.open(tmp_path)
        for name, expected in load_file(tmp_path / SINGLE).items():
            assert torch.equal(checkpoint.tensor(name), expected)
            assert torch.equal(expected, saved[name])
        assert torch.equal(checkpoint.tensor("a", 1), saved["a"][1])
        joined = checkpoint.joined("b", "c")
        assert joined is not None
        assert torch.equal(joined, torch.cat([saved["b"], saved["c"]]))
        checkpoint.release("a")
        assert torch.equal(checkpoint.tensor("a"), saved["a"])

    def test_metadata_is_no_tensor(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(2)}, tmp_path / SINGLE, metadata={"format": "pt"})
        assert set(Checkpoint.open(tmp_path).entries) == {"a"}


def shift(file: Path, n_more: int) -> None:
    """Move a file's data by some bytes: safetensors itself pads its headers to eight."""
    whole = file.read_bytes()
    n_header = int.from_bytes(whole[:8], "little")
    file.write_bytes((n_header + n_more).to_bytes(8, "little") + whole[8 : 8 + n_header] + b" " * n_more)
    with file.open("ab") as stream:
        stream.write(whole[8 + n_header :])


class TestJoined:
    def test_neighbours_become_one_view(self, tmp_path: Path) -> None:
        gate, up = torch.rand(3, 4), torch.rand(2, 4)
        checkpoint = Checkpoint.open(save_single(tmp_path, {"a": gate, "b": up}))
        joined = checkpoint.joined("a", "b")
        assert joined is not None
        assert torch.equal(joined, torch.cat([gate, up]))
        assert joined.data_ptr() == checkpoint.tensor("a").data_ptr()

    @pytest.mark.parametrize(
        ("first", "second"), [("b", "a"), ("a", "c"), ("a", "a")], ids=["reversed", "one between", "itself"]
    )
    def test_others_do_not(self, tmp_path: Path, first: str, second: str) -> None:
        tensors = {name: torch.rand(2, 4) for name in "abc"}
        assert Checkpoint.open(save_single(tmp_path, tensors)).joined(first, second) is None

    def test_of_another_width_do_not(self, tmp_path: Path) -> None:
        checkpoint = Checkpoint.open(save_single(tmp_path, {"a": torch.rand(2, 4), "b": torch.rand(2, 5)}))
        assert checkpoint.joined("a", "b") is None

    def test_of_another_dtype_do_not(self, tmp_path: Path) -> None:
        save_single(tmp_path, {"a": torch.rand(2, 4), "b": torch.rand(2, 4).half()})
        checkpoint = Checkpoint.open(tmp_path)
        assert checkpoint.joined("a", "b") is None

    def test_in_different_files_do_not(self, tmp_path: Path) -> None:
        shards = {"one.safetensors": {"a": torch.rand(2, 4)}, "two.safetensors": {"b": torch.rand(2, 4)}}
        assert Checkpoint.open(save_sharded(tmp_path, shards)).joined("a", "b") is None


class TestMapped:
    def test_tensors_of_a_file_share_one_mapping(self, tmp_path: Path) -> None:
        checkpoint = Checkpoint.open(save_single(tmp_path, {"a": torch.rand(5, 3), "b": torch.rand(7)}))
        a, b = checkpoint.tensor("a"), checkpoint.tensor("b")
        assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        assert a.untyped_storage().nbytes() == (tmp_path / SINGLE).stat().st_size
        for name, tensor in (("a", a), ("b", b)):
            assert tensor.data_ptr() - tensor.untyped_storage().data_ptr() == checkpoint.entries[name].offset

    def test_asking_twice_gives_the_same_memory(self, tmp_path: Path) -> None:
        checkpoint = Checkpoint.open(save_single(tmp_path, {"a": torch.rand(5, 3)}))
        assert checkpoint.tensor("a").data_ptr() == checkpoint.tensor("a").data_ptr()

    def test_the_mapping_can_not_be_written_through(self, tmp_path: Path) -> None:
        file = tmp_path / SINGLE
        checkpoint = Checkpoint.open(save_single(tmp_path, {"a": torch.zeros(4)}))
        checkpoint.tensor("a")
        modes = {line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line}
        assert modes == {"r--s"}, "a file larger than memory can only be mapped shared and read-only"

    def test_an_unlinked_file_stays_readable(self, tmp_path: Path) -> None:
        a, b = torch.rand(300, 300), torch.rand(300, 300)
        checkpoint = Checkpoint.open(save_single(tmp_path, {"a": a, "b": b}))
        seen = checkpoint.tensor("a")
        (tmp_path / SINGLE).unlink()
        assert torch.equal(seen, a)
        assert torch.equal(checkpoint.tensor("b"), b)

    def test_only_what_is_touched_becomes_resident(self, tmp_path: Path) -> None:
        file = tmp_path / SINGLE
        save_sparse(file, n_tensors=4, n_bytes=16 * MIB)
        checkpoint = Checkpoint.open(tmp_path)
        assert mapped_kib(file) == 0, "opening reads nothing"
        tensors = [checkpoint.tensor(f"t{i}") for i in range(4)]
        assert mapped_kib(file, "Size") >= 64 * 1024
        assert mapped_kib(file) < 1024, "a view reads nothing"
        tensors[1].sum()
        assert 16 * 1024 <= mapped_kib(file) < 20 * 1024, "reading one tensor reads one tensor"

    def test_loading_a_model_looks_at_no_expert(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []
        view = Checkpoint._view

        def noted(self: Checkpoint, name: str, *args: Any) -> Tensor:
            asked.append(name)
            return view(self, name, *args)

        monkeypatch.setattr(Checkpoint, "_view", noted)
        loaded = load(save_tiny(tmp_path), EngineConfig())
        assert asked
        assert not [name for name in asked if ".experts." in name]
        asked.clear()
        assert isinstance(store := loaded.weights.__self__, MappedStore)  # type: ignore[attr-defined]
        assert store._experts == {}
        loaded.weights(0, 3)
        assert {re.sub(r"\D+", " ", name).split()[1] for name in asked} == {"3"}


def save_sparse(file: Path, *, n_tensors: int, n_bytes: int) -> None:
    """Write a safetensors file whose data are holes: large, and quickly made."""
    entries = {
        f"t{i}": {"dtype": "F32", "shape": [n_bytes // 4], "data_offsets": [i * n_bytes, (i + 1) * n_bytes]}
        for i in range(n_tensors)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + n_tensors * n_bytes)
