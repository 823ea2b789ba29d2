"""A model's shape: its sizes, and the bytes and operations that follow from them.

Shapes and machines are *profiles*: JSON objects in files, shipped in a folder or the user's own.
"""

from collections.abc import Mapping, Set
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from fiddler.errors import ConfigError
from fiddler.formats.layouts import LAYOUTS, announced_layout
from fiddler.given import read_json


def names(folder: Path) -> list[str]:
    """Return the names of the profiles that a folder ships, sorted."""
    return sorted(path.stem for path in folder.glob("*.json"))


def find(folder: Path, name_or_path: str | Path) -> Path:
    """Return the file of a shipped profile, or of a path as given; `ConfigError` names the profiles there are."""
    shipped = folder / f"{name_or_path}.json"
    if str(name_or_path) in names(folder):
        return shipped
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(
            f"no profile {str(name_or_path)!r}; give the path of a JSON file, or one of: {', '.join(names(folder))}"
        )
    return path


def read(path: Path, required: Set[str], optional: Set[str] = frozenset()) -> dict[str, Any]:
    """Return the object in a file; `ConfigError` names the file and every unknown or missing key."""
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    return keyed(value, str(path), required, optional)


def keyed(value: object, where: str, required: Set[str], optional: Set[str] = frozenset()) -> dict[str, Any]:
    """Return an object whose keys are the required ones and some of the optional; else `ConfigError`."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: must be a JSON object")
    unknown = sorted(set(value) - required - optional)
    if unknown:
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)}")
    missing = sorted(required - set(value))
    if missing:
        raise ConfigError(f"{where}: missing key {', '.join(missing)}")
    return dict(value)


def text(value: object, where: str) -> str:
    """Return a text that is not empty; else raises `ConfigError`."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: must be a text that is not empty")
    return value


FOLDER = Path(__file__).parent.parent / "shapes"
DENSE_BYTES = 2
"""Bytes of a weight outside the experts, and of a key or value: bf16, also where experts are quantised."""

FLOATS = "bf16"
"""The name of no format."""

_NAMES = {
    "n_experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k"),
    "expert_intermediate": ("moe_intermediate_size", "intermediate_size"),
    "hidden": ("hidden_size",),
    "n_heads": ("num_attention_heads",),
    "vocab": ("vocab_size",),
    "num_hidden_layers": ("num_hidden_layers",),
}
"""The names architectures give a size in their `config.json`; the first that is there counts."""


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): ranks and widths of a head."""

    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    q_rank: int = 0
    """0 where queries are projected directly."""

    def __post_init__(self) -> None:
        _check_whole(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model's sizes. Norms and biases, under 0.1 % of the bytes, are left out.

    Raises `ConfigError` for a size that is impossible.
    """

    name: str
    n_layers: int
    """Layers with experts."""
    n_dense_layers: int = 0
    """Layers without experts."""
    hidden: int
    expert_intermediate: int
    n_experts: int
    """Routed experts of a layer."""
    top_k: int
    n_shared_experts: int = 0
    shared_intermediate: int = 0
    """Intermediate size of each shared expert."""
    dense_intermediate: int = 0
    """Intermediate size of the MLP in a layer without experts."""
    n_heads: int
    n_kv_heads: int
    head_dim: int
    latent: Latent | None = None
    """Set where attention is latent; `n_kv_heads` and `head_dim` then say nothing."""
    vocab: int
    tied: bool = False
    """Whether the output head is the embedding, so that memory holds it once."""
    gated: bool = True
    """Whether an MLP has three matrices (gate, up, down) instead of two."""
    quant: str | None = None
    """Format of the routed experts, of `formats.layouts`; `None`: floats."""
    bytes_per_weight: float = 2.0
    """Bytes of a routed expert's weight where `quant` is none: 2 for bf16, or a file's average of many formats."""
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _check_whole(self)
        if self.top_k > self.n_experts:
            raise ConfigError(f"top_k={self.top_k} is more than n_experts={self.n_experts}")
        if bool(self.n_shared_experts) != bool(self.shared_intermediate):
            raise ConfigError("n_shared_experts and shared_intermediate belong together")
        if self.n_dense_layers and not self.dense_intermediate:
            raise ConfigError("dense_intermediate must be set where there are layers without experts")
        if not 0.0 < self.bytes_per_weight <= 8.0:
            raise ConfigError(f"bytes_per_weight={self.bytes_per_weight!r} must be above 0 and at most 8")
        if self.quant is not None:
            self._check_quant(self.quant)

    @property
    def total_experts(self) -> int:
        """Routed experts of all layers."""
        return self.n_layers * self.n_experts

    @property
    def expert_weights(self) -> int:
        """Weights of one routed expert: matrices x hidden x intermediate."""
        return self._mlp(self.expert_intermediate)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one routed expert: as stored in its format, or as floats."""
        if self.quant is None:
            return round(self.expert_weights * self.bytes_per_weight)
        layout, sizes = LAYOUTS[self.quant], (self.expert_intermediate, self.hidden)
        up, down = layout.nbytes(*sizes), layout.nbytes(*reversed(sizes))
        return (2 if self.gated else 1) * up + down

    @property
    def expert_flops_per_row(self) -> int:
        """Operations of one row: a multiplication and an addition per weight."""
        return 2 * self.expert_weights

    @property
    def dense_weights(self) -> int:
        """Weights, outside the routed experts, of a layer with experts: attention, router, shared experts."""
        shared = self.n_shared_experts * self._mlp(self.shared_intermediate)
        return self._attention() + self.hidden * self.n_experts + shared

    @property
    def dense_bytes(self) -> int:
        """Bytes of `dense_weights`."""
        return self.dense_weights * DENSE_BYTES

    @property
    def plain_weights(self) -> int:
        """Weights of a layer without experts: attention and MLP."""
        return self._attention() + self._mlp(self.dense_intermediate)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values (or of latents) that a layer keeps per token.

        A sliding window bounds reads, not storage: this counts every layer as attending to all tokens.
        """
        if self.latent is not None:
            return (self.latent.kv_rank + self.latent.rope_dim) * DENSE_BYTES
        return 2 * self.n_kv_heads * self.head_dim * DENSE_BYTES

    @property
    def head_bytes(self) -> int:
        """Bytes of the output head; the embedding is as large."""
        return self.vocab * self.hidden * DENSE_BYTES

    @property
    def resident_bytes(self) -> int:
        """Bytes of everything but the routed experts, which always lie on the GPU."""
        layers = self.n_layers * self.dense_weights + self.n_dense_layers * self.plain_weights
        return layers * DENSE_BYTES + self.head_bytes * (1 if self.tied else 2)

    def _check_quant(self, quant: str) -> None:
        if quant not in LAYOUTS:
            raise ConfigError(f"quant={quant!r} is unknown; known: {', '.join(LAYOUTS)}")
        try:
            _ = self.expert_bytes
        except ValueError as error:
            raise ConfigError(f"quant={quant!r}: {error}") from error

    def _mlp(self, intermediate: int) -> int:
        return (3 if self.gated else 2) * self.hidden * intermediate

    def _attention(self) -> int:
        if self.latent is None:
            return 2 * self.hidden * self.head_dim * (self.n_heads + self.n_kv_heads)
        a = self.latent
        query = self.n_heads * (a.nope_dim + a.rope_dim)
        queries = a.q_rank * (self.hidden + query) if a.q_rank else self.hidden * query
        keys_values = self.hidden * (a.kv_rank + a.rope_dim) + a.kv_rank * self.n_heads * (a.nope_dim + a.value_dim)
        return queries + keys_values + self.n_heads * a.value_dim * self.hidden

    def stored_as(self, quant: str) -> "ModelShape":
        """Return the shape with its experts in a format, or in bf16. Raises `ConfigError` for an unknown one."""
        return replace(self, quant=None if quant == FLOATS else quant)

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self:
        """Read a shipped shape by its name, or a file; `ConfigError` names the file and the key that is wrong."""
        path = find(FOLDER, name_or_path)
        required, optional = _keys(cls)
        values = read(path, required - {"name"} | {"source"}, optional - {"source"})
        text(values["source"], f"{path}: source")
        try:
            if values.get("latent") is not None:
                values["latent"] = Latent(**keyed(values["latent"], "latent", *_keys(Latent)))
            return cls(name=path.stem, **values)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str | None = None, *, announced: bool = True) -> Self:
        """Read the mapping in a transformers `config.json`; `name` is its `model_type` unless given.

        Experts are in the format that it announces, or in bf16: always so unless `announced`. Raises `ConfigError`
        that names every size that is missing, or the one that is impossible, and for a format that is not known.
        """
        whole, config = config, config.get("text_config") or config
        sizes = {size: _first(config, *known) for size, known in _NAMES.items()}
        missing = ["|".join(_NAMES[size]) for size, value in sizes.items() if value is None]
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}")
        wrong = [f"{size}={value!r}" for size, value in sizes.items() if type(value) is not int or value < 1]
        if wrong:
            raise ConfigError(f"config.json: {', '.join(wrong)} must be a whole number of at least 1")
        total = sizes.pop("num_hidden_layers")
        n_layers = sum(_has_experts(config, layer) for layer in range(total))
        n_heads = sizes["n_heads"]
        n_shared, shared_intermediate = _shared(config, sizes["expert_intermediate"])
        return cls(
            name=name or str(config.get("model_type", "")),
            n_layers=n_layers,
            n_dense_layers=total - n_layers,
            dense_intermediate=config.get("intermediate_size", 0) if n_layers < total else 0,
            n_kv_heads=_first(config, "num_key_value_heads") or n_heads,
            head_dim=_first(config, "head_dim") or sizes["hidden"] // n_heads,
            latent=_latent(config),
            tied=bool(config.get("tie_word_embeddings", False)),
            n_shared_experts=n_shared,
            shared_intermediate=shared_intermediate,
            quant=_quant({**whole, **config}) if announced else None,
            **sizes,
        )


def shapes() -> list[str]:
    """Return the names of the shapes that ship with Fiddler."""
    return names(FOLDER)


def _first(config: Mapping[str, Any], *known: str) -> Any:
    return next((config[name] for name in known if config.get(name) is not None), None)


def _has_experts(config: Mapping[str, Any], layer: int) -> bool:
    kinds = config.get("mlp_layer_types")
    if kinds:
        return bool(kinds[layer] == "sparse")
    often = config.get("moe_layer_freq") or 1
    due = often[layer] if isinstance(often, (list, tuple)) else layer % often == 0
    return (
        bool(due)
        and layer >= (config.get("first_k_dense_replace") or 0)
        and layer not in (config.get("mlp_only_layers") or ())
        and (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0
    )


def _quant(config: Mapping[str, Any]) -> str | None:
    try:
        return announced_layout(config)
    except ValueError as error:
        raise ConfigError(f"config.json: {error}; name the format with --quant") from error


def _latent(config: Mapping[str, Any]) -> Latent | None:
    if not config.get("kv_lora_rank"):
        return None
    sizes = {size: config.get(size) for size in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
    missing = [size for size, value in sizes.items() if value is None]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}")
    nope, rope, value = (int(size) for size in sizes.values() if size is not None)
    return Latent(config["kv_lora_rank"], nope, rope, value, q_rank=config.get("q_lora_rank") or 0)


def _shared(config: Mapping[str, Any], expert_intermediate: int) -> tuple[int, int]:
    width = _first(config, "shared_expert_intermediate_size")
    n_shared = _first(config, "n_shared_experts", "num_shared_experts") or (1 if width else 0)
    return n_shared, (width or expert_intermediate) if n_shared else 0


def _keys(cls: type[ModelShape] | type[Latent]) -> tuple[set[str], set[str]]:
    required = {f.name for f in fields(cls) if f.default is MISSING}
    return required, {f.name for f in fields(cls)} - required


def _check_whole(sizes: ModelShape | Latent) -> None:
    for f in fields(sizes):
        value = getattr(sizes, f.name)
        least = 1 if f.default is MISSING else 0
        if f.type is int and (type(value) is not int or value < least):
            raise ConfigError(f"{f.name}={value!r} must be a whole number of at least {least}")
