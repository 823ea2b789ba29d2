"""A GGUF file, or the parts of a split one, opened without reading a tensor."""

from collections.abc import Iterable
from collections.abc import Mapping as MappingOf
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fiddler.errors import CheckpointError
from fiddler.formats import ggml
from fiddler.formats.gguf import GgufTensor
from fiddler.formats.quantised import Quantised
from fiddler.given import open_regular, shown
from fiddler.store.checkpoint import Checkpoint, Entry
from fiddler.store.gguf import FLOATS, Described, Header, read_header
from fiddler.store.gguf_parts import all_parts
from fiddler.store.mapping import Mapping


class GgufCheckpoint(Checkpoint):
    """The tensors of a GGUF file by its own names; `placed` gives them those that a model has.

    Blocks are stored as rows of bytes.
    """

    is_gguf = True

    def __init__(
        self,
        file: Path,
        stored: MappingOf[str, Entry],
        mappings: MappingOf[Path, Mapping],
        metadata: MappingOf[str, Any],
        kinds: MappingOf[str, Described],
    ) -> None:
        super().__init__(file, stored, mappings)
        self.metadata = metadata
        """What the file says of its model; of a list of strings only its length."""
        self.described = kinds
        """Its tensors by name."""
        entries = {name: entry if kinds[name].kind in FLOATS else of(kinds[name]) for name, entry in stored.items()}
        self.entries = MappingProxyType(entries)

    @classmethod
    def open(cls, folder: Path) -> "GgufCheckpoint":
        """Read the headers of a file and of the parts beside it, `folder` being the first.

        Raises `CheckpointError` for a missing, truncated or damaged file and for parts that are not of one model,
        and `UnsupportedModelError` for what gguf-py does not know.
        """
        stored: dict[str, Entry] = {}
        mappings: dict[Path, Mapping] = {}
        kinds: dict[str, Described] = {}
        metadata: dict[str, Any] = {}
        files = all_parts(folder)
        for number, file in enumerate(files):
            mapping, header = _open(file)
            _check_part(file, header, number, len(files))
            metadata = metadata or header.metadata
            if twice := kinds.keys() & {tensor.name for tensor in header.tensors}:
                raise CheckpointError(f"{file} has {min(twice)!r} once more; its parts are not of one model")
            kinds |= {tensor.name: tensor for tensor in header.tensors}
            stored |= {tensor.name: _entry(file, tensor) for tensor in header.tensors}
            mappings[file] = mapping
        n_due = metadata.get("split.tensors.count", len(stored)) if len(files) > 1 else len(stored)
        if n_due != len(stored):
            raise CheckpointError(f"{folder} has {len(stored)} tensors where {n_due} are due; download it again")
        return cls(folder, stored, mappings, metadata, kinds)

    def placed(self, dense: MappingOf[str, GgufTensor], experts: Iterable[str]) -> "GgufCheckpoint":
        """Return this checkpoint with `dense` by the names that a model has, and `experts` by the file's own."""
        named = GgufCheckpoint(self.folder, self.headers, self._mappings, self.metadata, self.described)
        kept: dict[str, Entry | Quantised] = {name: self.entries[name] for name in experts}
        named.entries = MappingProxyType({**kept, **dense})
        return named


def of(tensor: Described) -> GgufTensor:
    """Return a tensor as it is read."""
    kind = tensor.kind if tensor.kind in FLOATS else tensor.kind.lower()
    block = (1, ggml.BLOCKS[kind].group) if kind in ggml.BLOCKS else (1, 1)
    return GgufTensor(tensor.name, tensor.shape, {"codes": tensor.name}, kind, tensor.nbytes, block)


def _entry(file: Path, tensor: Described) -> Entry:
    if tensor.kind in FLOATS:
        return Entry(file, tensor.offset, tensor.nbytes, tensor.kind, tensor.shape)
    return Entry(file, tensor.offset, tensor.nbytes, "U8", (*tensor.shape[:-1], tensor.row_bytes))


def _open(file: Path) -> tuple[Mapping, Header]:
    try:
        with open_regular(file) as stream:
            if not stream.read(1):
                raise ValueError("it is empty")
            mapping = Mapping(file, stream)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be opened: {error}") from error
    header = read_header(memoryview(mapping.bytes.numpy().data), file)
    mapping.check()
    return mapping, header


def _check_part(file: Path, header: Header, number: int, count: int) -> None:
    stated = header.metadata.get("split.no", 0), header.metadata.get("split.count", 0) or 1
    if stated != (number, count):
        raise CheckpointError(
            f"{file} is number {shown(stated[0])} (from 0) of {shown(stated[1])} parts, and by its name number "
            f"{number} of {count}; give it its name back, and put all parts into one folder"
        )
