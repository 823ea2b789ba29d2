"""Saves recorded routing as a file and loads it: safetensors, whose header anyone can read and whose tensors can be
mapped.

Not parquet: that is one more dependency, for a few arrays of small integers that every reader takes whole.

Tensors, for `N` tokens of all sequences one after the other, `L` layers and `K` experts a token:

    experts        [N, L, K]  U8 or I16   who was visited; nobody is 255 in U8 and -1 in I16
    weights        [N, L, K]  F16         the router's weight of each visit; may be absent
    ahead          [N, L, K]  as experts  what a look-ahead from the layer before expected; may be absent
    offsets        [S + 1]    I64         sequence s is tokens offsets[s]:offsets[s + 1]
    prompt_tokens  [S]        I64         how many of its first tokens are its prompt

Metadata: `format` and `version` (the constants below), `model`, and as JSON lists `n_experts`, by layer, and
`names`, of the sequences. A layer whose tokens visit fewer than `K` experts is filled up with nobody.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from fiddler.errors import ConfigError
from fiddler.recording import Recording, RoutingTrace

FORMAT = "fiddler-routing"
VERSION = "1"

_DTYPES = {
    "experts": ("U8", "I16"),
    "weights": ("F16",),
    "ahead": ("U8", "I16"),
    "offsets": ("I64",),
    "prompt_tokens": ("I64",),
}
_OPTIONAL = ("weights", "ahead")
_NOBODY = 255
"""The number of no expert, among bytes."""
_MOST_EXPERTS = 1 << 15

Tensors = Mapping[str, NDArray[Any]]


def save(path: Path, trace: RoutingTrace) -> None:
    """Write a trace; a reader finds the old file or the new one, never half of one.

    Raises `ConfigError` where the file cannot be written, and where the recordings do not fit the model or each
    other.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        tensors, names = _joined(trace), [recording.name for recording in trace.recordings]
        _check(tensors, trace.n_experts, names)
        lists = {"n_experts": json.dumps(trace.n_experts), "names": json.dumps(names)}
        metadata = {"format": FORMAT, "version": VERSION, "model": trace.model, **lists}
        new.write_bytes(_serialised(_narrowed(tensors, max(trace.n_experts)), metadata))
        new.replace(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{path}: the routing cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


def load(path: Path) -> RoutingTrace:
    """Read a trace. Raises `ConfigError`, which names the file and its fault."""
    try:
        metadata, tensors = _read(path)
        n_experts, names = _n_experts(metadata), _names(metadata)
        _check(tensors, n_experts, names)
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{path} is no recorded routing: {error}") from error
    return RoutingTrace(metadata.get("model", ""), n_experts, tuple(_recordings(tensors, names)))


def _joined(trace: RoutingTrace) -> dict[str, NDArray[Any]]:
    """Return the sequences one after the other, as wide as the widest."""
    recordings = trace.recordings
    shape = (len(trace.n_experts), max((r.experts.shape[-1] for r in recordings), default=1))
    lengths = [len(recording.experts) for recording in recordings]
    tensors: dict[str, NDArray[Any]] = {
        "experts": _stacked([r.experts for r in recordings], shape, -1, np.int16),
        "offsets": np.cumsum([0, *lengths], dtype=np.int64),
        "prompt_tokens": np.array([r.n_prompt for r in recordings], dtype=np.int64),
    }
    for name, blank, dtype in (("weights", 0, np.float16), ("ahead", -1, np.int16)):
        given = [rows for r in recordings if (rows := getattr(r, name)) is not None]
        if given and len(given) < len(recordings):
            raise ValueError(f"{len(given)} of {len(recordings)} sequences have {name}: all must, or none")
        if given:
            if [rows.shape for rows in given] != [recording.experts.shape for recording in recordings]:
                raise ValueError(f"{name} and experts differ in shape")
            tensors[name] = _stacked(given, shape, blank, dtype)
    return tensors


def _stacked(parts: Sequence[NDArray[Any]], shape: tuple[int, int], blank: int, dtype: Any) -> NDArray[Any]:
    """Return arrays `[T, L, K]` as one `[N, L, K]`, narrower ones filled up."""
    n_layers, top_k = shape
    for part in parts:
        if part.ndim != 3 or part.shape[1] != n_layers:
            raise ValueError(f"a sequence of shape {list(part.shape)} is not of a model of {n_layers} layers")
    widths = [((0, 0), (0, 0), (0, top_k - part.shape[2])) for part in parts]
    wide = [np.pad(part, width, constant_values=blank) for part, width in zip(parts, widths, strict=True)]
    return np.concatenate([np.empty((0, *shape), dtype), *wide]).astype(dtype)


def _narrowed(tensors: Tensors, most_experts: int) -> dict[str, NDArray[Any]]:
    """Return the tensors as they lie in the file, ids as bytes where they fit."""
    small = most_experts <= _NOBODY
    return {
        name: np.where(tensor < 0, _NOBODY, tensor).astype(np.uint8) if small and "U8" in _DTYPES[name] else tensor
        for name, tensor in tensors.items()
    }


def _serialised(tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> bytes:
    """Return a file's bytes, the same for the same trace: safetensors puts metadata in another order each time."""
    whole = serialise(tensors, metadata)
    stop = 8 + int.from_bytes(whole[:8], "little")
    header = json.dumps({**json.loads(whole[8:stop]), "__metadata__": metadata}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + whole[stop:]


def _read(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Return a file's metadata, and its tensors with ids as `int16`."""
    with safe_open(path, framework="np") as file:
        metadata: dict[str, str] = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        if metadata.get("version") != VERSION:
            raise ValueError(f"its version is {metadata.get('version')!r}; this Fiddler reads {VERSION!r}")
        found = set(file.keys())
        if wrong := sorted(found ^ set(_DTYPES) - ({*_OPTIONAL} - found)):
            raise ValueError(f"it {'has' if wrong[0] in found else 'lacks'} a tensor {wrong[0]!r}")
        for name in found:
            if (dtype := file.get_slice(name).get_dtype()) not in _DTYPES[name]:
                raise ValueError(f"{name} is {dtype}, not {' or '.join(_DTYPES[name])}")
        return metadata, {name: _widened(file.get_tensor(name)) for name in found}


def _widened(tensor: NDArray[Any]) -> NDArray[Any]:
    if tensor.dtype != np.uint8:
        return tensor
    wide = tensor.astype(np.int16)
    wide[wide == _NOBODY] = -1
    return wide


def _n_experts(metadata: Mapping[str, str]) -> tuple[int, ...]:
    numbers = _listed(metadata, "n_experts")
    if not numbers or not all(type(n) is int and 0 < n <= _MOST_EXPERTS for n in numbers):
        raise ValueError(f"n_experts must be numbers of experts from 1 to {_MOST_EXPERTS}, by layer")
    return tuple(numbers)


def _names(metadata: Mapping[str, str]) -> list[str]:
    names = _listed(metadata, "names")
    if not all(isinstance(name, str) for name in names):
        raise ValueError("names must be texts")
    return names


def _listed(metadata: Mapping[str, str], field: str) -> list[Any]:
    try:
        value = json.loads(metadata.get(field, ""))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise ValueError(f"{field} is no JSON list")
    return value


def _check(tensors: Tensors, n_experts: Sequence[int], names: Sequence[str]) -> None:
    """Raise `ValueError` where tensors do not fit together."""
    experts, offsets, prompts = tensors["experts"], tensors["offsets"], tensors["prompt_tokens"]
    if not n_experts:
        raise ValueError("the model has no layers")
    if experts.ndim != 3 or experts.shape[1] != len(n_experts) or not experts.shape[2]:
        raise ValueError(f"experts of shape {list(experts.shape)} are not of a model of {len(n_experts)} layers")
    for name in _OPTIONAL:
        if name in tensors and tensors[name].shape != experts.shape:
            raise ValueError(f"{name} of shape {list(tensors[name].shape)} beside experts of {list(experts.shape)}")
    if offsets.shape != (len(names) + 1,) or prompts.shape != (len(names),):
        raise ValueError(f"offsets and prompt_tokens are not of {len(names)} sequences")
    lengths = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != len(experts) or (lengths < 0).any():
        raise ValueError(f"offsets do not divide {len(experts)} tokens into sequences")
    if (prompts < 0).any() or (prompts > lengths).any():
        raise ValueError("a prompt is longer than its sequence")
    for name in ("experts", "ahead"):
        if name in tensors:
            _check_ids(name, tensors[name], n_experts)


def _check_ids(name: str, ids: NDArray[Any], n_experts: Sequence[int]) -> None:
    limits = np.array(n_experts)[:, None]
    wrong = np.argwhere((ids < -1) | (ids >= limits))
    if len(wrong):
        token, layer, visit = wrong[0]
        raise ValueError(f"{name} names {ids[token, layer, visit]} among the {n_experts[layer]} of layer {layer}")


def _recordings(tensors: Tensors, names: Sequence[str]) -> Iterator[Recording]:
    weights, ahead = tensors.get("weights"), tensors.get("ahead")
    bounds = pairwise(tensors["offsets"].tolist())
    for name, n_prompt, (start, stop) in zip(names, tensors["prompt_tokens"].tolist(), bounds, strict=True):
        yield Recording(
            name,
            n_prompt,
            tensors["experts"][start:stop],
            None if weights is None else weights[start:stop],
            None if ahead is None else ahead[start:stop],
        )
