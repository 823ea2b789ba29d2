"""A checkpoint's weights as a GGUF file, the only kind that llama.cpp reads: the same numbers, in another order.

    python -m bench.peers.gguf_file FOLDER [--experts Q8_0]

Experts may be quantised, for a run of Fiddler and llama.cpp on the same file.
"""

import argparse
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from bench import checkpoints
from bench.peers import gguf_model
from bench.peers.gguf_model import Target
from bench.peers.peer import installed, require, weight_bytes
from bench.workload import UnavailableError

VERSION = 1
"""Raised where the same checkpoint is to become another file."""
KINDS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
"""gguf's `GGMLQuantizationType`: nothing is rounded."""
ROUNDED = ("Q8_0", "Q4_0", "MXFP4")
"""Types to which gguf-py rounds."""


def of(folder: Path, experts: str | None = None) -> Path:
    """Return the GGUF file of the checkpoint in `folder`, written first if the cache has none yet.

    `experts` is one of `ROUNDED`, or `None` to leave their numbers as they are; a GGUF file is its own. Takes as
    much disk as the checkpoint, and the memory of one layer's largest tensor. Raises `UnavailableError` where gguf
    is not installed, llama.cpp does not know the model, or the disk has no room.
    """
    if folder.suffix == ".gguf":
        return folder
    gguf = installed("gguf", "gguf")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    gguf_model.check(config)
    cache = checkpoints.CACHE / "gguf"
    file = cache / f"{folder.resolve().name}-{_fingerprint(folder)}{f'-{experts}' if experts else ''}.gguf"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        require("disk for the GGUF file", weight_bytes(folder), shutil.disk_usage(cache).free)
        partial = file.with_suffix(".partial")
        try:
            _write(gguf, config, folder, partial, experts)
            partial.rename(file)  # the file appears whole or not at all
        finally:
            partial.unlink(missing_ok=True)
    return file


def _fingerprint(folder: Path) -> str:
    """Hash the weights' names and when they were written: hashing all of them would take longer than a run."""
    digest = hashlib.sha256(f"{VERSION}".encode() + (folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(stream.read(int.from_bytes(stream.read(8), "little")))
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _write(gguf: Any, config: Any, folder: Path, file: Path, experts: str | None) -> None:
    architecture = gguf.MODEL_ARCH[gguf_model.ARCHITECTURES[config.model_type]]
    name_map = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    with ExitStack() as stack:
        stack.callback(writer.close)
        shards = [stack.enter_context(safe_open(shard, "pt")) for shard in sorted(folder.glob("*.safetensors"))]
        holders = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118 - not a dict
        targets = gguf_model.targets(holders, config, name_map)
        gguf_model.add_values(writer, config)
        for target in targets:
            _declare(gguf, writer, holders, target, experts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for target in targets:
            values = _values(holders, target)
            if experts and len(target.sources) > 1:
                values = gguf.quants.quantize(_floats(values), gguf.GGMLQuantizationType[experts])
            writer.write_tensor_data(values)


def _floats(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return bfloat16's bytes `[…, 2 n]` as float32 `[…, n]`."""
    widened: np.ndarray[Any, Any] = torch.from_numpy(values).view(torch.bfloat16).float().numpy()
    return widened


def _declare(gguf: Any, writer: Any, holders: Mapping[str, Any], target: Target, experts: str | None) -> None:
    """Announce a tensor, of which nothing but the shape is read yet."""
    first = holders[target.sources[0]].get_tensor(target.sources[0])
    dtype = _dtype(first, target)
    if dtype not in KINDS:
        raise UnavailableError(f"the GGUF writer does not know weights in {dtype}")
    shape = (len(target.sources), *first.shape) if len(target.sources) > 1 else tuple(first.shape)
    n_bytes = len(target.sources) * first.numel() * dtype.itemsize
    kind = gguf.GGMLQuantizationType[KINDS[dtype]]
    if experts and len(target.sources) > 1:
        kind = gguf.GGMLQuantizationType[experts]
        columns, size = gguf.GGML_QUANT_SIZES[kind]
        n_bytes = len(target.sources) * first.numel() // columns * size
    # The kind says it all; numpy's dtype, which has no bfloat16, is asked for only to tell bytes from values.
    writer.add_tensor_info(target.name, shape, np.dtype(np.float32), n_bytes, raw_dtype=kind)


def _values(holders: Mapping[str, Any], target: Target) -> np.ndarray[Any, Any]:
    """Return a tensor's values as the bytes that are written."""
    parts = [holders[name].get_tensor(name) for name in target.sources]
    whole = torch.stack(parts) if len(parts) > 1 else parts[0]
    whole = whole.to(_dtype(whole, target))
    if target.n_paired_heads:
        whole = paired(whole, target.n_paired_heads)
    values: np.ndarray[Any, Any] = whole.contiguous().view(torch.uint8).numpy()
    return values


def _dtype(tensor: Tensor, target: Target) -> torch.dtype:
    return torch.float32 if target.is_float32 or tensor.ndim == 1 else tensor.dtype


def paired(weight: Tensor, n_heads: int) -> Tensor:
    """Bring each head's two halves of rows side by side; `weight` is `[n_heads * head_dim, H]`.

    transformers turns row i of a head with row i + head_dim / 2, llama.cpp row 2 i with row 2 i + 1.
    """
    halves = weight.unflatten(0, (n_heads, 2, -1))  # [heads, 2, head_dim / 2, H]
    pairs: Tensor = halves.transpose(1, 2).flatten(0, 2)
    return pairs


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a file and say where it is."""
    parser = argparse.ArgumentParser("gguf_file", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--experts", choices=ROUNDED, help="what experts are rounded to (default: nothing)")
    options = parser.parse_args(arguments)
    print(of(options.folder, options.experts))


if __name__ == "__main__":
    main()
