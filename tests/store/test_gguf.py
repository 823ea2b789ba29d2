"""A GGUF header is believed in nothing: files that are cut, lie about counts or offsets, or are parts of others."""

import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fiddler import CheckpointError, UnsupportedModelError
from fiddler.errors import ModelError
from fiddler.store.folder import find_checkpoint
from fiddler.store.gguf import read_header
from fiddler.store.gguf_files import GgufCheckpoint

WORDS = ["<s>", "wörd", "\u0120the"]


def write(file: Path, *, split: int = 0) -> Path:
    """Write a file of four tensors, in parts of `split` each."""
    writer = gguf.GGUFWriter(file, "qwen3moe", split_max_tensors=split)
    writer.add_block_count(3)
    writer.add_token_list(WORDS)
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_float32("some.float", 0.5)
    writer.add_bool("some.flag", True)
    for n in range(3):
        writer.add_tensor(f"blk.{n}.attn_q.weight", np.full((4, 8), n, dtype=np.float32))
    codes = gguf.quants.quantize(np.ones((2, 3, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up_exps.weight", codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("whole") / "m.gguf").read_bytes()


def opened(folder: Path, data: bytes) -> GgufCheckpoint:
    file = folder / "m.gguf"
    file.write_bytes(data)
    return GgufCheckpoint.open(find_checkpoint(file))


def test_what_a_file_says_is_read(whole: bytes, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, whole)
    metadata = checkpoint.metadata
    assert metadata["general.architecture"] == "qwen3moe"
    assert (metadata["qwen3moe.block_count"], metadata["some.numbers"]) == (3, [1, 2, 3])
    assert (metadata["some.float"], metadata["some.flag"]) == (0.5, True)
    assert metadata["tokenizer.ggml.tokens"] == len(WORDS)
    kept = read_header(memoryview(whole), tmp_path, keep=("tokenizer.ggml.tokens",))
    assert kept.metadata["tokenizer.ggml.tokens"] == WORDS
    assert checkpoint.tensor("blk.2.attn_q.weight").tolist() == [[2.0] * 8] * 4
    entry = checkpoint.entries["blk.0.ffn_up_exps.weight"]
    assert (entry.dtype, entry.shape, entry.nbytes) == ("q8_0", (2, 3, 64), 2 * 3 * 68)
    (matrix,) = checkpoint.matrices("blk.0.ffn_up_exps.weight", 1)
    assert matrix.shape == (3, 64)
    assert torch.allclose(matrix.dense(torch.float32), torch.ones(3, 64), atol=0.01)


def at(data: bytes, before: bytes, change: Callable[[int], bytes], size: int) -> bytes:
    """Change a number that stands behind some bytes."""
    start = data.index(before) + len(before)
    number = int.from_bytes(data[start : start + size], "little")
    return data[:start] + change(number) + data[start + size :]


def counted(data: bytes, place: int, n: int) -> bytes:
    return data[:place] + struct.pack("<Q", n) + data[place + 8 :]


UP = b"blk.0.ffn_up_exps.weight"
FAULTS: Mapping[str, tuple[Callable[[bytes], bytes], type[ModelError], str]] = {
    "nothing": (lambda _: b"", CheckpointError, "or empty"),
    "another format": (lambda data: b"GGML" + data[4:], CheckpointError, "does not begin with GGUF"),
    "a pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\n", CheckpointError, "git-lfs pointer"),
    "version 1": (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], UnsupportedModelError, "of version 1"),
    "big-endian": (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], UnsupportedModelError, "big-endian"),
    "absurd tensors": (lambda data: counted(data, 8, 1 << 62), CheckpointError, "it counts 4611686018427387904"),
    "absurd values": (lambda data: counted(data, 16, 1 << 40), CheckpointError, "it counts 1099511627776"),
    "more tensors": (lambda data: counted(data, 8, 5), CheckpointError, "truncated or not GGUF"),
    "a long name": (lambda data: counted(data, 24, 1 << 50), CheckpointError, "bytes are due at 32"),
    "an absurd list": (
        lambda data: at(data, b"some.numbers\x09\0\0\0\x05\0\0\0", lambda _: struct.pack("<Q", 1 << 60), 8),
        CheckpointError,
        "it counts 1152921504606846976",
    ),
    "an unknown value": (
        lambda data: at(data, b"some.flag", lambda _: struct.pack("<I", 77), 4),
        CheckpointError,
        "a value of type 77",
    ),
    "no dimension": (lambda data: at(data, UP, lambda _: struct.pack("<I", 0), 4), CheckpointError, "0 dimensions"),
    "many dimensions": (lambda data: at(data, UP, lambda _: struct.pack("<I", 99), 4), CheckpointError, "99 dim"),
    "half a block": (
        lambda data: at(data, UP + struct.pack("<I", 3), lambda _: struct.pack("<Q", 63), 8),
        CheckpointError,
        "not filled by blocks of 32",
    ),
    "an empty tensor": (
        lambda data: at(data, UP + struct.pack("<I", 3), lambda _: struct.pack("<Q", 0), 8),
        CheckpointError,
        "not filled",
    ),
    "an absurd size": (
        lambda data: at(data, UP + struct.pack("<I", 3), lambda _: struct.pack("<Q", 1 << 60), 8),
        CheckpointError,
        "would take .* and the file has",
    ),
    "an unknown type": (
        lambda data: at(data, UP + struct.pack("<IQQQ", 3, 64, 3, 2), lambda _: struct.pack("<I", 4), 4),
        UnsupportedModelError,
        "of type 4, which gguf does not know",
    ),
    "an offset beyond the end": (
        lambda data: at(data, UP + struct.pack("<IQQQI", 3, 64, 3, 2, 8), lambda _: struct.pack("<Q", 1 << 50), 8),
        CheckpointError,
        "would take 408 bytes at",
    ),
    "an offset beside the grid": (
        lambda data: at(data, UP + struct.pack("<IQQQI", 3, 64, 3, 2, 8), lambda _: struct.pack("<Q", 1), 8),
        CheckpointError,
        "would take 408 bytes at",
    ),
    "a name twice": (lambda data: data.replace(b"blk.1.attn_q", b"blk.2.attn_q"), CheckpointError, "of one name"),
    "no text": (lambda data: data.replace("wörd".encode(), b"w\xff\xfe\xfdd"), CheckpointError, "utf-8"),
    "cut data": (lambda data: data[:-40], CheckpointError, "would take"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str, whole: bytes, tmp_path: Path) -> None:
    change, refusal, match = FAULTS[fault]
    if fault == "no text":  # words are read only where they are asked for
        with pytest.raises(refusal, match=match):
            read_header(memoryview(change(whole)), tmp_path, keep=("tokenizer.ggml.tokens",))
        return
    with pytest.raises(refusal, match=match):
        opened(tmp_path, change(whole))


@given(st.data())
def test_a_header_that_is_cut_or_changed_ends_in_an_error_or_in_the_file(whole: bytes, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, len(whole)))
    bad = bytearray(whole[:n])
    for _ in range(data.draw(st.integers(0, 3))):
        if bad:
            bad[data.draw(st.integers(0, min(len(bad), 700) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = read_header(memoryview(bytes(bad)), Path("m.gguf"))
    except ModelError:
        return
    assert all(tensor.offset >= 0 and tensor.offset + tensor.nbytes <= n for tensor in header.tensors)


def test_parts_are_found_from_any_of_them(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", split=2)
    names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    for name in names:
        checkpoint = GgufCheckpoint.open(find_checkpoint(tmp_path / name))
        assert [file.name for file in checkpoint.files] == names
        assert len(checkpoint.headers) == 4
        assert checkpoint.tensor("blk.2.attn_q.weight").tolist() == [[2.0] * 8] * 4


def test_parts_that_are_missing_or_others_are_named(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", split=1)
    parts = [tmp_path / f"m-{n:05}-of-00004.gguf" for n in range(1, 5)]
    alone = tmp_path / "alone.gguf"
    shutil.copy(parts[0], alone)
    with pytest.raises(CheckpointError, match=r"is number 0 .from 0. of 4 parts, and by its name number 0 of 1"):
        GgufCheckpoint.open(find_checkpoint(alone))
    kept = parts[2].rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"lacks 1 of 4 files, first m-00003-of-00004\.gguf"):
        find_checkpoint(parts[0])
    shutil.copy(parts[1], parts[2])
    with pytest.raises(CheckpointError, match=r"is number 1 .from 0. of 4 parts, and by its name number 2"):
        GgufCheckpoint.open(find_checkpoint(parts[0]))
    data = parts[1].read_bytes()
    parts[2].write_bytes(data.replace(*(b"split.no\x02\0\0\0" + bytes([n, 0]) for n in (1, 2))))
    with pytest.raises(CheckpointError, match="once more"):
        GgufCheckpoint.open(find_checkpoint(parts[0]))
    parts[2].write_bytes(kept.read_bytes())
    assert len(GgufCheckpoint.open(find_checkpoint(parts[3])).headers) == 4
    with pytest.raises(CheckpointError, match="no model has"):
        find_checkpoint(parts[0].rename(tmp_path / "m-00009-of-00004.gguf"))


def test_a_folder_of_files_says_which_to_give(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "m.gguf", split=1)
    with pytest.raises(CheckpointError, match=r"give a file: .*m-00001-of-00004\.gguf$"):
        find_checkpoint(folder)
    write(folder / "a.Q4_0.gguf")
    with pytest.raises(CheckpointError, match=r"give a file: .*a\.Q4_0\.gguf or another of 2$"):
        find_checkpoint(folder)


@pytest.mark.parametrize("name", ["sha256-6a0746a1ec1a", "pytorch_model.bin"])
def test_a_file_of_another_name_wants_the_suffix(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf").rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"holds GGUF; give it, .* a name that ends in \.gguf"):
        find_checkpoint(file)


@pytest.mark.parametrize("name", ["models/none.gguf", "owner/model/none.Q4_K_M.gguf", "none.GGUF"])
def test_a_file_that_is_not_there_is_not_asked_for_at_the_hub(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"is not there; give the path .*`hf download OWNER/MODEL FILE"):
        find_checkpoint(name)
