"""Maps checkpoint tensors to experts' parts, by transformers' own conversion mapping, and checks their shapes.

The only module that touches transformers' private loading code (`core_model_loading`, `conversion_mapping`); the
exactness suite runs it on the lowest and the highest version that `pyproject.toml` admits. The mapping's operations
are replayed on views of one expert at a time, so nothing is copied; views express every operation that any
architecture's experts need.

`check_views` compares every expert's tensors with the shapes that the model computes with, from the headers alone.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedModel
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping

from fiddler.errors import CheckpointError, UnsupportedModelError
from fiddler.formats.quantised import Quantised
from fiddler.models.seam import ExpertsModule
from fiddler.store.checkpoint import EXPERT_DTYPES, EXPERT_NAMES, Checkpoint, Entry
from fiddler.store.mapped import (
    Axis,
    Every,
    ExpertParts,
    Layout,
    Select,
    Step,
    Transpose,
    View,
    rows_of,
    unviewable,
)

Shape = tuple[int, ...]


def check_views(
    parameter: str, due: Shape, experts: Sequence[tuple[View, ...]], entries: Mapping[str, Entry | Quantised]
) -> None:
    """Hold the views that make each expert's part of a parameter against the shape `due`, `[out, in]` or `[out]`.

    An expert has one view, or two halves along `out`. Raises `CheckpointError`, which names the tensor and both
    shapes, and for numbers that are no floats of 16 bits or more; `UnsupportedModelError` where experts of a layer
    are quantised in different ways, or their numbers lie in an order that cannot be seen as `[out, in]`.
    """
    kinds: dict[object, str] = {}
    for views in experts:
        out, *rest = due
        share = (out // len(views), *rest) if out % len(views) == 0 else None
        for view in views:
            entry = entries[view.tensor]
            if isinstance(entry, Quantised):
                _check_packed(view, entry)
            elif entry.dtype not in EXPERT_DTYPES:
                raise CheckpointError(f"tensor {view.tensor!r} is {entry.dtype}; experts must be {EXPERT_NAMES}")
            kinds.setdefault(_kind(entry), view.tensor)
            if len(kinds) > 1:
                one, other = kinds.values()
                raise UnsupportedModelError(_mixed(one, other, entries))
            if share is None or _seen(entry.shape, view.steps) != share:
                raise CheckpointError(_complaint(parameter, due, views, view, entry))


def _kind(entry: Entry | Quantised) -> object:
    """Return what must be one in a layer; scales of another kind, and zeros that some lack, show in the bytes."""
    return (entry.dtype, entry.block, entry.nbytes) if isinstance(entry, Quantised) else "floats"


def _mixed(one: str, other: str, entries: Mapping[str, Entry | Quantised]) -> str:
    stored = [f"tensor {name!r} is {_stored(entries[name])}" for name in (one, other)]
    return (
        f"{' and '.join(stored)}; Fiddler takes them in one format for a layer: use another quantised version, or "
        "the one in bf16"
    )


def _stored(entry: Entry | Quantised) -> str:
    blocks = f" in blocks of {list(entry.block)}" if isinstance(entry, Quantised) else ""
    return f"{entry.dtype}{blocks}, {entry.nbytes} bytes"


def _check_packed(view: View, entry: Quantised) -> None:
    fused = bool(view.steps) and isinstance(view.steps[0], Select)
    if fused != (len(entry.shape) == 3) or rows_of(entry, view.steps[fused:]) is None:
        raise UnsupportedModelError(unviewable(view.tensor, entry))


def _complaint(parameter: str, due: Shape, views: tuple[View, ...], view: View, entry: Entry | Quantised) -> str:
    part = "" if len(views) == 1 else f" and this is a part of {len(views)}"
    found = _seen(entry.shape, view.steps)
    seen = "" if found == entry.shape else f" ({_named(found)} for an expert)"
    return (
        f"tensor {view.tensor!r} is {_named(entry.shape)}{seen} where {parameter} has {_named(due)} an "
        f"expert{part}; config.json and the weights are not of one model, or damaged: download the checkpoint again"
    )


def _named(shape: Shape | None) -> str:
    return "no matrix" if shape is None else str(list(shape))


@lru_cache(maxsize=1 << 10)
def _seen(shape: Shape, steps: tuple[Step, ...]) -> Shape | None:
    """Return the shape of a view of a tensor of `shape`; `None` where the steps cannot be taken."""
    for step in steps:
        match step, shape:
            case Select(index), (n, *rest) if index < n:
                shape = tuple(rest)
            case Transpose(), (rows, columns):
                shape = columns, rows
            case Every(0, start), (n, *rest):
                shape = ((n - start + 1) // 2, *rest)
            case Every(1, start), (rows, n):
                shape = rows, (n - start + 1) // 2
            case _:
                return None
    return shape


_MERGING = (loading.MergeModulelist, loading.ErnieFuseAndSplitTextVisionExperts)
"""Operations that make one parameter of a list with a tensor per expert."""


@dataclass(frozen=True, slots=True)
class Source:
    """Checkpoint tensors of one expert parameter, by source pattern, and the operations that join them."""

    tensors: Mapping[str, tuple[str, ...]]
    converter: loading.WeightConverter | None


def expert_layout(model: PreTrainedModel, experts: Mapping[str, ExpertsModule], checkpoint: Checkpoint) -> Layout:
    """Find the parts of every expert of `experts` (by module path, in layer order).

    Raises `CheckpointError` where a parameter has no tensors, the wrong number, or any of another shape or kind of
    number than it has; `UnsupportedModelError` for a format whose conversion no view can express.
    """
    sources = {} if checkpoint.is_gguf else _sources(model, _wanted(experts), checkpoint.entries)
    layers = []
    for path, module in experts.items():
        views = {}
        for name in _parameters(module):
            parameter = f"{path}.{name}"
            if checkpoint.is_gguf:
                from fiddler.models.gguf_experts import expert_views

                views[name] = expert_views(path, name, module._shapes[name][0], checkpoint)
            elif parameter in sources:
                views[name] = _views(parameter, module, sources[parameter], checkpoint)
            else:
                raise CheckpointError(f"{checkpoint.folder} has no tensor for {parameter}")
            check_views(parameter, _due(module, name), views[name], checkpoint.entries)
        layers.append(_layer(module, views))
    return Layout(tuple(layers))


def _parameters(module: ExpertsModule) -> tuple[str, ...]:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    weights = (up, "down_proj")
    return (*weights, f"{up}_bias", "down_proj_bias") if module.has_bias else weights


class _Names:
    """transformers' names for a checkpoint's tensors; `wanted` are the parameters that are looked for."""

    def __init__(self, model: PreTrainedModel, wanted: set[str]) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [m for m in mapping if isinstance(m, loading.WeightRenaming)]
        self._converters = [m for m in mapping if isinstance(m, loading.WeightConverter)]
        self._prefix, self._meta = model.base_model_prefix, dict.fromkeys(wanted, True)
        self.by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}

    def of(self, name: str) -> tuple[str, str | None]:
        """Return the name of the parameter that a tensor goes into, and the pattern by which it does."""
        meta = self._meta
        renamed, pattern = loading.rename_source_key(name, self._renamings, self._converters, self._prefix, meta)
        return (name, None) if renamed not in meta and name in meta else (renamed, pattern)

    def have(self, name: str) -> bool:
        """Whether a tensor of this name has a place."""
        renamed, pattern = self.of(name)
        return pattern is not None or renamed in self._meta


def is_read(model: PreTrainedModel, experts: Mapping[str, ExpertsModule], names: Iterable[str]) -> bool:
    """Whether transformers itself finds experts' tensors by these names."""
    own = _Names(model, _wanted(experts))
    return all(map(own.have, names))


def _wanted(experts: Mapping[str, ExpertsModule]) -> set[str]:
    return {f"{path}.{name}" for path, module in experts.items() for name in _parameters(module)}


def _sources(
    model: PreTrainedModel, wanted: set[str], entries: Mapping[str, Entry | Quantised]
) -> dict[str, Source]:
    """Group the checkpoint's tensors by the expert parameter they go into, as transformers would."""
    names = _Names(model, wanted)
    by_pattern = names.by_pattern
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    spare: list[tuple[str, str]] = []

    def place(name: str, seen: str) -> None:
        renamed, pattern = names.of(seen)
        if pattern is None and renamed not in wanted:
            spare.append((renamed, name))
        for target in _targets(renamed, by_pattern.get(pattern or "")) & wanted:
            found[target][pattern or ""].append(name)

    for name in sorted(entries, key=loading.dot_natural_key):
        place(name, name)
    # Some layers have experts side by side as a weight of theirs, and fused tensors are named without.
    for name in [name for _, name in spare if wanted - set(found) and _is_fused(entries[name])]:
        place(name, f"{name}.weight")
    made = {
        parameter: Source({p: tuple(t) for p, t in by.items()}, by_pattern.get(next(iter(by))))
        for parameter, by in found.items()
    }
    return made | _apart(wanted - set(made), spare, model)


def _is_fused(entry: Entry | Quantised) -> bool:
    return isinstance(entry, Quantised) and len(entry.shape) == 3


_MATRIX = re.compile(r"(.*\bexperts)\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_PLACES = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}


def _apart(missing: set[str], spare: Sequence[tuple[str, str]], model: PreTrainedModel) -> dict[str, Source]:
    """Return the sources of parameters that a checkpoint has as a matrix an expert, and transformers only as one.

    Some architectures have their floats fused, and are published quantised as plain linear layers, `[out, in]`
    even where the fused ones are `[in, out]`. `spare` are the tensors without a place, by the names that
    transformers gives them.
    """
    if not missing:
        return {}
    found: dict[str, tuple[list[str], ...]] = defaultdict(lambda: ([], [], []))
    for renamed, name in spare:
        if match := _MATRIX.fullmatch(renamed):
            found[match[1]][_PLACES[match[2]]].append(name)
    made = {}
    for path, (gates, ups, downs) in found.items():
        kinds = {"gate_up_proj": (gates, ups), "up_proj": (ups,), "down_proj": (downs,)}
        for parameter, lists in kinds.items():
            if f"{path}.{parameter}" in missing and all(lists):
                turned = bool(model.get_submodule(path).is_transposed)
                made[f"{path}.{parameter}"] = _side_by_side(parameter, lists, turned=turned)
    return made


def _side_by_side(parameter: str, lists: Sequence[list[str]], *, turned: bool) -> Source:
    patterns = [f"experts.*.{i}.weight" for i in range(len(lists))]
    operations: list[loading.ConversionOps] = [loading.MergeModulelist(dim=0)]
    if turned:
        operations.append(loading.Transpose(1, 2))
    operations.append(loading.Concatenate(dim=2 if turned else 1))
    converter = loading.WeightConverter(patterns, parameter, operations)
    return Source({p: tuple(names) for p, names in zip(converter.source_patterns, lists, strict=True)}, converter)


def _targets(renamed: str, converter: loading.WeightConverter | None) -> set[str]:
    """Return every parameter a tensor goes into: a converter may split one tensor over several."""
    if converter is None:
        return {renamed}
    first = converter.target_patterns[0]
    return {renamed, *(renamed.replace(first, other) for other in converter.target_patterns[1:])}


def _due(module: ExpertsModule, name: str) -> tuple[int, ...]:
    """Return the shape of one expert's part of a parameter as it is computed with: `[out, in]` or `[out]`."""
    _, *shape = module._shapes[name]
    return tuple(reversed(shape)) if module.is_transposed and not name.endswith("_bias") else tuple(shape)


def _views(parameter: str, module: ExpertsModule, source: Source, checkpoint: Checkpoint) -> list[tuple[View, ...]]:
    """Return one parameter's views by expert, side by side along its output dimension."""
    shape = module._shapes[parameter.rpartition(".")[2]]
    # An expert's output dimension, once the leading expert dimension is gone.
    out_axis: Axis = 1 if module.is_transposed else 0
    replay = _Replay(parameter, _share(parameter, source), shape, checkpoint, out_axis)
    views = [replay.views(expert) for expert in range(shape[0])]
    if module.is_transposed and not parameter.endswith("_bias"):
        views = [tuple(map(_turned, parts)) for parts in views]
    return views


def _turned(view: View) -> View:
    """Return a view of the transpose."""
    if view.steps[-1:] == (Transpose(),):
        return View(view.tensor, view.steps[:-1])
    return View(view.tensor, (*view.steps, Transpose()))


def _share(parameter: str, source: Source) -> Source:
    """Return the tensors of one target of a conversion that splits its lists over several, in equal runs."""
    converter = source.converter
    if converter is None or len(converter.target_patterns) == 1:
        return source
    if not any(isinstance(op, loading.ErnieFuseAndSplitTextVisionExperts) for op in converter.operations):
        raise UnsupportedModelError(f"{parameter}: {converter} splits experts in a way Fiddler does not know")
    mine = next(i for i, target in enumerate(converter.target_patterns) if target in parameter)
    shares = {}
    for pattern, tensors in source.tensors.items():
        size = -(-len(tensors) // len(converter.target_patterns))
        shares[pattern] = tensors[mine * size : (mine + 1) * size]
    return Source(shares, converter)


@dataclass(frozen=True, slots=True)
class _Replay:
    """A conversion's operations on views of one expert at a time; `shape` is the whole parameter's."""

    parameter: str
    source: Source
    shape: tuple[int, ...]
    checkpoint: Checkpoint
    out_axis: Axis

    def views(self, expert: int) -> tuple[View, ...]:
        """Return one expert's views."""
        converter = self.source.converter
        operations = converter.operations if converter is not None else []
        merged = any(isinstance(op, _MERGING) for op in operations)
        parts: list[View] = []
        for pattern in converter.source_patterns if converter is not None else self.source.tensors:
            tensors = self.source.tensors.get(pattern, ())
            if merged and len(tensors) == self.shape[0]:
                parts.append(View(tensors[expert]))
            elif not merged and len(tensors) == 1 and self._shape(tensors[0])[:1] == self.shape[:1]:
                parts.append(View(tensors[0], (Select(expert),)))
            else:
                raise CheckpointError(
                    f"{self.parameter} has {self.shape[0]} experts, the checkpoint {len(tensors)} tensors "
                    f"({', '.join(tensors[:1]) or 'none'} …); download it again"
                )
        for op in operations:
            parts = self._step(op, parts)
        return tuple(parts)

    def _step(self, op: loading.ConversionOps, parts: list[View]) -> list[View]:
        """Apply one operation; its dimensions count the leading expert dimension, a view's do not."""
        out_dim = self.out_axis + 1
        match op:
            case loading.MergeModulelist(dim=0):
                return parts
            case loading.Concatenate(dim=dim) if dim == out_dim:
                return parts
            case loading.ErnieFuseAndSplitTextVisionExperts(stack_dim=0, concat_dim=dim) if dim == out_dim:
                return parts
            case loading.Interleave(dim=dim, inverse=False) if dim == out_dim and len(parts) == 1:
                view = parts[0]
                return [View(view.tensor, (*view.steps, Every(self.out_axis, start))) for start in (0, 1)]
            case loading.Transpose() if {op.dim0, op.dim1} == {1, 2}:
                if op.check_dims and all(self._shape(v.tensor) == self.shape for v in parts):
                    return parts
                return [_turned(view) for view in parts]
        raise UnsupportedModelError(f"{self.parameter}: {type(op).__name__} is not a conversion Fiddler knows")

    def _shape(self, tensor: str) -> tuple[int, ...]:
        return tuple(self.checkpoint.entries[tensor].shape)


def _layer(module: ExpertsModule, views: Mapping[str, list[tuple[View, ...]]]) -> tuple[ExpertParts, ...]:
    up, down, *biases = (views[name] for name in _parameters(module))
    if not biases:
        return tuple(ExpertParts(up[e], _only(down[e])) for e in range(len(up)))
    return tuple(ExpertParts(up[e], _only(down[e]), biases[0][e], _only(biases[1][e])) for e in range(len(up)))


def _only(views: tuple[View, ...]) -> View:
    (view,) = views
    return view
