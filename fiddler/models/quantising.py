"""Writes a checkpoint anew with quantised experts, in compressed-tensors' form, one of transformers and vLLM.

Experts' matrices become `….weight_packed` and `….weight_scale`, one expert after the other; every other tensor and
file is copied. A file of the source becomes a file of the target. The configuration comes last: a folder without
it is unfinished, and the same conversion goes on with where it ended.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fiddler.errors import CheckpointError, ConfigError, UnsupportedModelError
from fiddler.formats.packed import Code, Packed
from fiddler.formats.quantise import TARGETS, quantise
from fiddler.formats.quantised import Quantised
from fiddler.models import seam
from fiddler.models.loaded import refuse_groups
from fiddler.models.naming import expert_layout
from fiddler.models.skeleton import meta_skeleton, read_config
from fiddler.store.checkpoint import Checkpoint, Entry
from fiddler.store.folder import CONFIG, INDEX, SINGLE, find_checkpoint, read_raw
from fiddler.store.gguf_parts import is_gguf
from fiddler.store.mapped import ExpertParts, Select, Transpose, View

MADE_BY = "fiddler"
"""Key of a file's metadata: the digest of its conversion, and its errors by layer."""
WORD_BYTES = 4
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True, slots=True)
class Piece:
    """An expert's matrix, or the half of one, in a tensor of the source."""

    name: str
    """Its name in the target, without `.weight`."""
    layer: int
    index: int | None
    """The expert's place in a tensor that holds several."""
    transposed: bool
    half: int | None
    """Which half of it this is, where gate and up are one matrix."""

    def of(self, tensor: Tensor) -> Tensor:
        """Return the matrix `[out, in]`."""
        matrix = tensor if self.index is None else tensor[self.index]
        matrix = matrix.t() if self.transposed else matrix
        return (matrix if self.half is None else matrix.chunk(2)[self.half]).float()


@dataclass(slots=True)
class Error:
    """Squares of what rounding changed in a layer's experts, and of their numbers."""

    changed: float = 0.0
    numbers: float = 0.0

    @property
    def relative(self) -> float:
        """Root mean square of the changes beside that of the numbers."""
        return sqrt(self.changed / self.numbers) if self.numbers else 0.0


@dataclass(frozen=True, slots=True)
class Written:
    """Result of a conversion."""

    folder: Path
    source_bytes: int
    """Bytes of the source's tensors."""
    written_bytes: int
    errors: Mapping[int, float]
    """By layer with experts, the root mean square error relative to the weights."""
    n_resumed: int
    """Files that an earlier run had written."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A checkpoint about to be written anew; opened by `Conversion.of`."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    pieces: Mapping[str, tuple[Piece, ...]]
    """By tensor of the source."""
    to: str
    made_from: str
    """Digest of the source and the way it is quantised: files of another are never mixed in."""
    errors: dict[int, Error] = field(default_factory=dict)

    @classmethod
    def of(cls, source: str | Path, to: str, *, trust_remote_code: bool = False) -> "Conversion":
        """Open a checkpoint that is to be quantised to a target of `TARGETS`.

        Raises `ConfigError` for an unknown target or experts whose rows its groups do not divide, the errors of
        opening a model, and `UnsupportedModelError` for experts that compressed-tensors has no names for.
        """
        if to not in TARGETS:
            raise ConfigError(f"to={to!r} is not one of {', '.join(TARGETS)}")
        folder = find_checkpoint(source)
        if is_gguf(folder):
            raise UnsupportedModelError(f"{folder} is GGUF; give the safetensors version of the model")
        config = read_config(folder, trust_remote_code=trust_remote_code)
        checkpoint = Checkpoint.open(folder)
        if any(isinstance(entry, Quantised) for entry in checkpoint.entries.values()):
            raise UnsupportedModelError(f"{folder.name} is quantised already; give its bf16, fp16 or fp32 version")
        skeleton = meta_skeleton(checkpoint, config, trust_remote_code=trust_remote_code)
        experts = seam.find_experts(skeleton)
        refuse_groups(experts.values(), to, "to")
        layout = expert_layout(skeleton, experts, checkpoint)
        pieces: dict[str, list[Piece]] = {}
        for layer, module in enumerate(experts.values()):
            _refuse(module, config.model_type, to)
            for expert, parts in enumerate(layout.experts[layer]):
                for tensor, piece in _pieces(module, layer, expert, parts):
                    pieces.setdefault(tensor, []).append(piece)
        named = {tensor: tuple(found) for tensor, found in pieces.items()}
        return cls(checkpoint, read_raw(folder), named, to, _digest(checkpoint, to))

    @property
    def n_matrices(self) -> int:
        """Matrices to quantise."""
        return sum(map(len, self.pieces.values()))

    def write(self, folder: Path, done: Callable[[], None] = lambda: None) -> Written:
        """Write the target, and call `done` after each matrix.

        Raises `ConfigError` for a folder that holds something else or cannot be written, `CheckpointError` for
        weights that are not finite or a file that changed meanwhile.
        """
        _refuse_folder(folder, self.made_from, self.checkpoint.folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            n_bytes, n_resumed = self._write_files(folder, done)
            self.checkpoint.check()
            _copy_others(self.checkpoint.folder, folder)
            config = {key: value for key, value in self.config.items() if key != "transformers_weights"}
            _write_json(folder / CONFIG, {**config, "quantization_config": self.quantization()})
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written: {error}; free some space, or give another") from error
        source_bytes = sum(entry.nbytes for entry in self.checkpoint.entries.values())
        errors = {layer: error.relative for layer, error in sorted(self.errors.items())}
        return Written(folder, source_bytes, n_bytes, errors, n_resumed)

    def _write_files(self, folder: Path, done: Callable[[], None]) -> tuple[int, int]:
        """Write every file of weights and the index; returns their bytes, and how many files were there."""
        n_bytes, n_resumed, places = 0, 0, dict[str, str]()
        by_file: dict[Path, list[str]] = {file: [] for file in self.checkpoint.files}
        for tensor, entry in self.checkpoint.entries.items():
            if isinstance(entry, Entry):
                by_file[entry.file].append(tensor)
        for file, tensors in by_file.items():
            name = file.relative_to(self.checkpoint.folder).as_posix()
            target = folder / name
            if self._resume(target):
                n_resumed += 1
                for _ in range(sum(len(self.pieces.get(tensor, ())) for tensor in tensors)):
                    done()
            else:
                self._write_file(target, tensors, done)
            with safe_open(str(target), framework="pt") as written:
                places |= dict.fromkeys(written.keys(), name)
            n_bytes += _tensor_bytes(target)
        if set(places.values()) != {SINGLE}:
            _write_json(folder / INDEX, {"metadata": {"total_size": n_bytes}, "weight_map": places})
        return n_bytes, n_resumed

    def _resume(self, file: Path) -> bool:
        """Whether a file was written before, by the same conversion; its errors are taken over."""
        if not file.is_file():
            return False
        noted = _noted(file)
        if noted is None or noted["from"] != self.made_from:
            return False
        self._add(noted["errors"])
        return True

    def _write_file(self, file: Path, tensors: list[str], done: Callable[[], None]) -> None:
        """Write what becomes of a file's tensors; whole or not at all."""
        content: dict[str, Tensor] = {}
        errors: dict[int, Error] = {}
        for tensor in tensors:
            for name, part in self._converted(tensor, errors, done):
                content[name] = part
            self.checkpoint.release(tensor)
        noted = {layer: (error.changed, error.numbers) for layer, error in errors.items()}
        self._add(noted)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        metadata = {"format": "pt", MADE_BY: json.dumps({"from": self.made_from, "errors": noted})}
        save_file(content, partial, metadata)
        shutil.copymode(self.checkpoint.files[0], partial)  # it is made for its owner alone
        partial.replace(file)

    def _converted(
        self, tensor: str, errors: dict[int, Error], done: Callable[[], None]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what becomes of a tensor, by name, and add to its layer's error."""
        whole = self.checkpoint.tensor(tensor)
        if tensor not in self.pieces:
            yield tensor, whole.clone()
        for piece in self.pieces.get(tensor, ()):
            matrix = piece.of(whole)
            try:
                packed = quantise(matrix, TARGETS[self.to])
            except ValueError as error:
                raise CheckpointError(f"tensor {tensor!r} cannot be quantised: {error}") from error
            changed = (packed.dense(torch.float32) - matrix).square().sum(dtype=torch.float64)
            own = errors.setdefault(piece.layer, Error())
            own.changed += float(changed)
            own.numbers += float(matrix.square().sum(dtype=torch.float64))
            yield from _stored(piece.name, packed)
            done()

    def _add(self, noted: Mapping[Any, tuple[float, float]]) -> None:
        for layer, (changed, numbers) in noted.items():
            error = self.errors.setdefault(int(layer), Error())
            error.changed += changed
            error.numbers += numbers

    def quantization(self) -> dict[str, Any]:
        """Return the `quantization_config`, as compressed-tensors defines it."""
        target = TARGETS[self.to]
        weights = {
            "num_bits": target.code.bits,
            "type": "float" if target.code is Code.FP8 else "int",
            "strategy": "group" if target.group else "channel",
            "group_size": target.group,
            "symmetric": True,
            "dynamic": False,
        }
        kind = "float-quantized" if target.code is Code.FP8 else "pack-quantized"
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": kind}
        return {
            "quant_method": "compressed-tensors",
            "format": kind,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": self._kept(),
        }

    def _kept(self) -> list[str]:
        """Return the modules that are not quantised, numbers in their names as patterns."""
        made = {piece.name for pieces in self.pieces.values() for piece in pieces}
        patterns = {"lm_head"}
        for name, entry in self.checkpoint.entries.items():
            module = name.removesuffix(".weight")
            if name not in self.pieces and module != name and len(entry.shape) == 2:
                patterns.add(
                    "re:" + re.sub(r"\d+", r"\\d+", re.escape(module)) if re.search(r"\d", module) else module
                )
        if any(re.fullmatch(p[3:], name) for p in patterns if p.startswith("re:") for name in made):
            raise UnsupportedModelError(f"{self.checkpoint.folder.name} names experts and others alike")
        return sorted(patterns)


def _refuse(module: seam.ExpertsModule, kind: str, to: str) -> None:
    """Refuse experts that compressed-tensors has no names for, or whose rows do not fill its words of 4 bytes."""
    if seam.formula(module).gate is not None or module.has_bias:
        raise UnsupportedModelError(
            f"the experts of {kind!r} have biases or a gate of their own, for which compressed-tensors has no names"
        )
    columns = module._shapes["down_proj"][1 if module.is_transposed else 2]
    if to == "int8" and columns % WORD_BYTES:
        raise ConfigError(
            f"to='int8' needs rows of a multiple of 4 numbers, and down_proj has {columns}; use to='fp8'"
        )


def _pieces(module: seam.ExpertsModule, layer: int, expert: int, parts: ExpertParts) -> Iterator[tuple[str, Piece]]:
    """Yield the tensor and the piece of each matrix of an expert."""
    ups = ("gate_proj", "up_proj") if module.has_gate else ("up_proj",)
    for views, names in ((parts.up, ups), ((parts.down,), ("down_proj",))):
        shares = [names] if len(views) == 1 else [(name,) for name in names]
        for view, share in zip(views, shares, strict=True):
            yield from _named(layer, expert, view, share)


def _named(layer: int, expert: int, view: View, names: tuple[str, ...]) -> Iterator[tuple[str, Piece]]:
    """Yield the pieces of a view that holds matrices of these names, one below the other."""
    index, transposed = None, False
    for step in view.steps:
        match step:
            case Select(at):
                index = at
            case Transpose():
                transposed = not transposed
            case _:
                raise UnsupportedModelError(f"{view.tensor} interleaves gate and up; compressed-tensors does not")
    own = view.tensor.removesuffix(".weight")
    of_expert = own.rpartition(".")[0] + ("" if index is None else f".{expert}")
    for i, name in enumerate(names):
        single = len(names) == 1
        full = own if index is None and single else f"{of_expert}.{name}"
        yield view.tensor, Piece(full, layer, index, transposed, None if single else i)


def _stored(name: str, packed: Packed) -> Iterator[tuple[str, Tensor]]:
    """Yield a matrix's tensors as compressed-tensors names and shapes them."""
    if packed.code is Code.FP8:
        yield f"{name}.weight", packed.codes.view(torch.float8_e4m3fn)
    else:
        yield f"{name}.weight_packed", packed.codes.contiguous().view(torch.int32)
        yield f"{name}.weight_shape", torch.tensor(packed.shape)
    assert packed.scales is not None
    yield f"{name}.weight_scale", packed.scales


def _digest(checkpoint: Checkpoint, to: str) -> str:
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    return hashlib.sha256(repr((files, to, TARGETS[to])).encode()).hexdigest()[:16]


def _noted(file: Path) -> dict[str, Any] | None:
    """Return what stands in a file of ours beside its weights; `None` for another's, or a damaged one."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            noted = json.loads((opened.metadata() or {})[MADE_BY])
            return noted if {"from", "errors"} <= noted.keys() else None
    except (SafetensorError, OSError, KeyError, ValueError, AttributeError):
        return None


def _refuse_folder(folder: Path, made_from: str, source: Path) -> None:
    """Refuse a target that holds files of anything but the same conversion."""
    if folder.resolve() == source.resolve():
        raise ConfigError(f"{folder} is the checkpoint itself; give another folder")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give another")
    try:
        found = sorted(folder.rglob("*")) if folder.is_dir() else []
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error}; give another") from error
    weights = [file for file in found if file.suffix == ".safetensors"]
    if weights and all((_noted(file) or {}).get("from") == made_from for file in weights):
        return
    if any(not file.name.endswith(".partial") for file in found):
        raise ConfigError(
            f"{folder} is not empty, and not of the same conversion; give another folder, or empty it"
        )


def _copy_others(source: Path, folder: Path) -> None:
    """Copy tokenizer, templates, code: every file at the top but weights and the configuration."""
    for file in source.iterdir():
        if file.is_file() and file.name != CONFIG and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, folder / file.name)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(file)


def _tensor_bytes(file: Path) -> int:
    """Return the bytes behind the header of a safetensors file."""
    with file.open("rb") as stream:
        return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
