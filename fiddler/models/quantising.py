"""Writes a checkpoint anew with quantised experts, in compressed-tensors' form, one of transformers and vLLM.

Experts' matrices become `….weight_packed` and `….weight_scale`, one expert after the other; every other tensor and
file is copied. A file of the source becomes a file of the target. The configuration comes last: a folder without
it is unfinished, and the same conversion goes on with where it ended.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, repeat
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fiddler.errors import CheckpointError, ConfigError, UnsupportedModelError
from fiddler.formats.packed import Code, Packed
from fiddler.formats.quantise import TARGETS, quantise
from fiddler.formats.quantised import Quantised
from fiddler.models import seam
from fiddler.models.naming import expert_layout, is_read
from fiddler.models.skeleton import meta_skeleton, read_config
from fiddler.store.checkpoint import Checkpoint, Entry
from fiddler.store.folder import CONFIG, INDEX, SINGLE, find_checkpoint, read_raw
from fiddler.store.gguf_parts import is_gguf
from fiddler.store.mapped import ExpertParts, Select, Transpose, View
from fiddler.store.target import Target

WORD_BITS = 32


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
    transformers_reads: bool
    """Whether transformers finds the experts; it leaves random those that it has only fused."""


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
    transformers_reads: bool
    """Whether transformers has a place for experts as they are written, one by one."""
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
        layout = expert_layout(skeleton, experts, checkpoint)
        pieces: dict[str, list[Piece]] = {}
        for layer, module in enumerate(experts.values()):
            _refuse(module, config.model_type, to)
            for expert, parts in enumerate(layout.experts[layer]):
                for tensor, piece in _pieces(module, layer, expert, parts):
                    pieces.setdefault(tensor, []).append(piece)
        named = {tensor: tuple(found) for tensor, found in pieces.items()}
        names = [f"{piece.name}.weight" for found in pieces.values() for piece in found]
        read = is_read(skeleton, experts, names)
        return cls(checkpoint, read_raw(folder), named, to, _digest(checkpoint, to), transformers_reads=read)

    @property
    def n_matrices(self) -> int:
        """Matrices to quantise."""
        return sum(map(len, self.pieces.values()))

    def write(self, folder: Path, done: Callable[[], None] = lambda: None) -> Written:
        """Write the target, and call `done` after each matrix.

        Raises `ConfigError` for a folder that holds something else or cannot be written, `CheckpointError` for
        weights that are not finite or a file that changed meanwhile.
        """
        target = Target(folder, self.made_from)
        target.check(self.checkpoint.folder)
        with target.writing():
            n_bytes, n_resumed = self._write_files(target, done)
            self.checkpoint.check()
            target.copy_others(self.checkpoint.folder)
            config = {key: value for key, value in self.config.items() if key != "transformers_weights"}
            target.write_json(CONFIG, {**config, "quantization_config": self.quantization()})
        source_bytes = sum(entry.nbytes for entry in self.checkpoint.entries.values())
        errors = {layer: error.relative for layer, error in sorted(self.errors.items())}
        return Written(folder, source_bytes, n_bytes, errors, n_resumed, self.transformers_reads)

    def _write_files(self, target: Target, done: Callable[[], None]) -> tuple[int, int]:
        """Write every file of weights and the index; returns their bytes, and how many files were there."""
        n_bytes, n_resumed, places = 0, 0, dict[str, str]()
        by_file: dict[Path, list[str]] = {file: [] for file in self.checkpoint.files}
        for tensor, entry in self.checkpoint.entries.items():
            if isinstance(entry, Entry):
                by_file[entry.file].append(tensor)
        for file, tensors in by_file.items():
            name = file.relative_to(self.checkpoint.folder).as_posix()
            noted = target.noted(target.folder / name)
            if noted is not None:
                self._add(noted)
                n_resumed += 1
                for _ in range(sum(len(self.pieces.get(tensor, ())) for tensor in tensors)):
                    done()
            else:
                self._write_file(target, name, tensors, done)
            places |= dict.fromkeys(target.names(name), name)
            n_bytes += target.tensor_bytes(name)
        if set(places.values()) != {SINGLE}:
            target.write_json(INDEX, {"metadata": {"total_size": n_bytes}, "weight_map": places})
        return n_bytes, n_resumed

    def _write_file(self, target: Target, name: str, tensors: list[str], done: Callable[[], None]) -> None:
        """Write what becomes of a file's tensors; whole or not at all."""
        content: dict[str, Tensor] = {}
        errors: dict[int, Error] = {}
        for tensor in tensors:
            content.update(self._converted(tensor, errors, done))
            self.checkpoint.release(tensor)
        noted = {layer: (error.changed, error.numbers) for layer, error in errors.items()}
        self._add(noted)
        target.write_tensors(name, content, noted, like=self.checkpoint.files[0])

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
            own = errors.setdefault(piece.layer, Error())
            own.changed += _squares(packed.dense(torch.float32) - matrix)
            own.numbers += _squares(matrix)
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
        # Layers that only guess tokens ahead have experts too, named as those of other layers: there the first
        # number is the layer's own, and where that does not tell them apart, all are.
        taken = [{_pattern(name, n_own) for name in made} for n_own in _OWN_NUMBERS]
        patterns = {"lm_head"}
        for name, entry in self.checkpoint.entries.items():
            module = name.removesuffix(".weight")
            if name not in self.pieces and module != name and len(entry.shape) == 2:
                found = [_pattern(module, n_own) for n_own in _OWN_NUMBERS]
                patterns.add(next(p for p, others in zip(found, taken, strict=True) if p not in others))
        return sorted(patterns)


def _refuse(module: seam.ExpertsModule, kind: str, to: str) -> None:
    """Refuse experts that compressed-tensors has no names for, or whose rows do not fill its groups or words."""
    if seam.formula(module).gate is not None or module.has_bias:
        raise UnsupportedModelError(
            f"the experts of {kind!r} have biases or a gate of their own, for which compressed-tensors has no names"
        )
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        columns = module._shapes[name][1 if module.is_transposed else 2]
        if columns % (multiple := _multiple(to)):
            other = next(target for target in TARGETS if columns % _multiple(target) == 0)
            raise ConfigError(
                f"to={to!r} needs rows of a multiple of {multiple} numbers, and {name} has {columns}; "
                f"use to={other!r}"
            )


def _multiple(to: str) -> int:
    """Return the numbers that a row must be a multiple of: those of a group, or of a word of integers."""
    target = TARGETS[to]
    return target.group or (1 if target.code is Code.FP8 else WORD_BITS // target.code.bits)


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
    path = own.rpartition(".")[0]
    if index is None:
        of_expert = path
    else:  # some fuse experts into a tensor beside the router, and below no `experts`
        of_expert = f"{path}.{expert}" if path.endswith(".experts") else f"{path}.experts.{expert}"
    for i, name in enumerate(names):
        single = len(names) == 1
        full = own if index is None and single else f"{of_expert}.{name}"
        yield view.tensor, Piece(full, layer, index, transposed, None if single else i)


def _squares(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64).square())


_OWN_NUMBERS = (0, 1, None)
"""Numbers of a name that a pattern keeps, from the first: none, the layer's, all."""


def _pattern(module: str, n_own: int | None) -> str:
    """Return a pattern of modules' names that differ from this one in all numbers but the first `n_own`."""
    own = chain(_NUMBER.findall(module)[:n_own], repeat(r"\d+"))
    pattern = _NUMBER.sub(lambda _: next(own), re.escape(module))
    return f"re:{pattern}" if r"\d+" in pattern else module


_NUMBER = re.compile(r"\d+")


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
