"""A described machine: its figures with their sources, and the costs on it of a model shape or of a loaded model.

The latter is for `device="sim:MACHINE"`: all that an engine takes from the lab.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from fiddler.cost.model import Contention, CostModel, Curve, Dense, ExpertCosts, Moves
from fiddler.errors import ConfigError
from fiddler.lab import shape as profile
from fiddler.lab.shape import DENSE_BYTES, ModelShape
from fiddler.types import ExpertWeights

if TYPE_CHECKING:
    from fiddler.models.loaded import LoadedModel


FOLDER = Path(__file__).parent.parent / "machines"
RESERVE_BYTES = 2**30
"""GPU memory that no slot gets: the CUDA context, activations, workspaces. Assumed, not measured."""

LEAST_FLOAT_BYTES = 2
"""Bytes of a weight that is not packed, at least."""
ROWS_A_DECODING = 16
"""Rows after which our kernels decode a weight again: `PANEL` of devices/desk.h."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A CPU, a GPU and the link between them: the rates that each sustains alone, in SI units.

    Raises `ConfigError` for a figure that is not finite, a rate or size not above 0, a time below 0, or a factor
    below 1.
    """

    name: str
    description: str
    cpu_read_bytes_per_s: float
    """Bytes of expert weights per second that the CPU's kernels read from host memory."""
    cpu_flop_per_s: float
    """Operations per second of the CPU's matrix products, on bf16 or fp16 weights."""
    cpu_decode_weights_per_s: float
    """Weights of packed experts per second that the CPU's kernels decode, besides reading them."""
    link_bytes_per_s: float
    """Bytes per second from pinned host memory to the GPU; activations take the same link, either way."""
    cpu_slowdown_beside_link: float
    """Factor on the CPU's seconds while the link is busy too: both read the same host memory."""
    link_slowdown_beside_cpu: float
    """Factor on the link's seconds while the CPU is busy too."""
    gpu_read_bytes_per_s: float
    """Bytes of weights per second that the GPU's kernels read from its own memory."""
    gpu_flop_per_s: float
    """Operations per second of the GPU's matrix products, dense, bf16 or fp16."""
    gpu_bytes: float
    host_bytes: float
    gpu_expert_launch_s: float
    """Seconds of an expert on the GPU besides its bytes or operations: its kernel launches."""
    cpu_expert_dispatch_s: float
    """Seconds of an expert on the CPU besides its bytes or operations: operator dispatch, waking the threads."""
    dense_launch_s: float
    """Seconds of a layer's dense part besides its bytes: its launches, in a CUDA graph or not (see the source)."""
    host_layer_s: float
    """Seconds of the host's own work per layer: routing read back, plan, hand-offs to the lanes."""
    move_fixed_s: float
    """Seconds per layer to move activations to the CPU and back, whatever their size."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """The source of each figure, by its name."""

    def __post_init__(self) -> None:
        for name in FIGURES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"{name}={value!r} must be a finite number")
            if "slowdown" in name:
                if value < 1.0:
                    raise ConfigError(f"{name}={value!r} must be at least 1")
            elif value < 0.0 or (
                value == 0.0 and not name.endswith(("launch_s", "dispatch_s", "layer_s", "fixed_s"))
            ):
                raise ConfigError(f"{name}={value!r} must be above 0")

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self:
        """Read a shipped machine by its name, or a file of the same form.

        Each figure is `{"value": number, "source": text}`. Raises `ConfigError` that names the file and the key for
        an unknown or missing key, a figure without a source, or one that is impossible.
        """
        path = profile.find(FOLDER, name_or_path)
        content = profile.read(path, {"description", *FIGURES})
        description = profile.text(content.pop("description"), f"{path}: description")
        figures = {
            name: profile.keyed(figure, f"{path}: {name}", {"value", "source"}) for name, figure in content.items()
        }
        sources = {name: profile.text(f["source"], f"{path}: {name}: source") for name, f in figures.items()}
        values = {name: f["value"] for name, f in figures.items()}
        try:
            return cls(name=path.stem, description=description, sources=MappingProxyType(sources), **values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


FIGURES = frozenset(f.name for f in fields(Machine)) - {"name", "description", "sources"}
"""Names of a machine's figures."""


def machines() -> list[str]:
    """Return the names of the machines that ship with Fiddler."""
    return profile.names(FOLDER)


def cost_model(shape: ModelShape, machine: Machine) -> CostModel:
    """Return a shape's costs on a machine. Nothing is measured: every curve is a roofline of the figures.

    An expert with n rows takes `fixed + max(bytes / read rate, n · operations / operation rate)` seconds on either
    side, and bytes / link rate to be copied; a packed one takes longer on the CPU (`packed_curve`). Not modelled:
    ramps of small products, decoding on a GPU, the attention's operations on a long context, and windows that bound
    its reads (its seconds are the bytes of keys and values).
    """
    packed = shape.quant is not None
    expert = expert_costs(machine, shape.expert_bytes, shape.expert_flops_per_row, packed=packed)
    return _costs(machine, (expert,) * shape.n_layers, shape.hidden * DENSE_BYTES, _dense(shape, machine))


def _costs(machine: Machine, experts: tuple[ExpertCosts, ...], row_bytes: int, dense: Dense) -> CostModel:
    return CostModel(
        experts=experts,
        contention=Contention(machine.cpu_slowdown_beside_link, machine.link_slowdown_beside_cpu),
        moves=Moves(machine.move_fixed_s, 2 * row_bytes / machine.link_bytes_per_s),  # there and back
        dense=dense,
        host_s=machine.host_layer_s,
    )


def expert_costs(machine: Machine, nbytes: int, flops: float, *, packed: bool = False) -> ExpertCosts:
    """Return the rooflines of an expert of `nbytes` that takes `flops` operations a row."""
    on_cpu = packed_curve if packed else _plain_curve
    return ExpertCosts(
        cpu=on_cpu(machine, nbytes, flops),
        gpu=Curve.roofline(
            machine.gpu_expert_launch_s, nbytes / machine.gpu_read_bytes_per_s, flops / machine.gpu_flop_per_s
        ),
        copy_s=nbytes / machine.link_bytes_per_s,
        nbytes=nbytes,
    )


def _plain_curve(machine: Machine, nbytes: int, flops: float) -> Curve:
    read_s, row_s = nbytes / machine.cpu_read_bytes_per_s, flops / machine.cpu_flop_per_s
    return Curve.roofline(machine.cpu_expert_dispatch_s, read_s, row_s)


def packed_curve(machine: Machine, nbytes: int, flops: float) -> Curve:
    """Return the seconds by rows of a packed expert on the CPU: the faster of two ways.

    In registers: `max(bytes / read rate + d, n · (operations / operation rate + d / 16))`, where d is the seconds
    to decode all weights. Decoding comes on top of reading, not beside it: so the times of one row of fifteen
    formats in bench/results/packed-2core-epyc.json are met within two fifths, of FP8 from above and of GGUF's
    blocks from below. Whole: read and decode once, write and read bf16, and multiply that.
    """
    n_weights = flops / 2.0
    decode_s = n_weights / machine.cpu_decode_weights_per_s
    first_s = nbytes / machine.cpu_read_bytes_per_s + decode_s
    row_s, again_s = flops / machine.cpu_flop_per_s, decode_s / ROWS_A_DECODING
    in_registers = Curve.roofline(machine.cpu_expert_dispatch_s, first_s, row_s + again_s)
    whole_s = first_s + 2 * n_weights * DENSE_BYTES / machine.cpu_read_bytes_per_s
    n = whole_s / again_s
    ends = [(m, machine.cpu_expert_dispatch_s + whole_s + m * row_s) for m in (n, 2.0 * n)]
    return Curve((*in_registers.points[:-1], *ends))


def n_slots(
    shape: ModelShape,
    machine: Machine,
    *,
    share: float | None = None,
    vram_bytes: float | None = None,
    context: int = 8192,
) -> int:
    """Return how many experts the GPU holds: a share of all of them, or as many as fit.

    A `share` between 0 and 1 is taken at its word, whether it fits or not, so that machines can be compared at
    equal shares. Without one, as many as fit in `vram_bytes` (the machine's, unless given) beside the dense
    weights, keys and values for `context` tokens in all, and `RESERVE_BYTES`. Raises `ConfigError` for both, for a
    share outside 0 to 1, or where not even the dense part fits.
    """
    if share is not None:
        if vram_bytes is not None or not 0.0 <= share <= 1.0:
            raise ConfigError(f"share={share!r} must be between 0 and 1, and without vram_bytes")
        return round(share * shape.total_experts)
    total = machine.gpu_bytes if vram_bytes is None else vram_bytes
    layers = shape.n_layers + shape.n_dense_layers
    left = total - shape.resident_bytes - context * layers * shape.kv_bytes_per_token - RESERVE_BYTES
    if left < 0.0:
        raise ConfigError(
            f"{shape.name} needs {(total - left) / 1e9:.1f} GB of GPU memory before its first expert, "
            f"{total / 1e9:.1f} GB are there"
        )
    return min(int(left // shape.expert_bytes), shape.total_experts)


def _dense(shape: ModelShape, machine: Machine) -> Dense:
    # A cost model knows only layers with experts: each bears its share of those without, and a step's sum is right.
    plain = shape.n_dense_layers / shape.n_layers
    weights = shape.dense_weights + plain * shape.plain_weights
    return Dense(
        rows=Curve.roofline(
            (1.0 + plain) * machine.dense_launch_s,
            weights * DENSE_BYTES / machine.gpu_read_bytes_per_s,
            2.0 * weights / machine.gpu_flop_per_s,
        ),
        context_s=(1.0 + plain) * shape.kv_bytes_per_token / machine.gpu_read_bytes_per_s,
        # Norm, head and sampling are launched like a layer.
        head=Curve.roofline(
            machine.dense_launch_s,
            shape.head_bytes / machine.gpu_read_bytes_per_s,
            2.0 * shape.vocab * shape.hidden / machine.gpu_flop_per_s,
        ),
    )


def described_costs(name_or_file: str, loaded: "LoadedModel") -> CostModel:
    """Return what a loaded model takes on a described machine: rooflines of its bytes and operations.

    Attention to the context is not counted: its time does not grow with the past. Raises `ConfigError` for an
    unknown machine.
    """
    machine = Machine.load(name_or_file)
    experts = tuple(_expert_on(machine, loaded.weights(layer, 0)) for layer in range(len(loaded.n_experts)))
    embeddings: Any = loaded.model.get_input_embeddings()
    head: Any = loaded.model.get_output_embeddings() or embeddings
    ends = {id(embeddings.weight), id(head.weight)}
    per_layer = sum(p.nbytes for p in loaded.model.parameters() if id(p) not in ends) / len(experts)
    row_bytes = embeddings.weight.shape[1] * embeddings.weight.itemsize
    dense = Dense(rows=_dense_on(machine, per_layer), head=_dense_on(machine, head.weight.nbytes))
    return _costs(machine, experts, row_bytes, dense)


def _dense_on(machine: Machine, nbytes: float) -> Curve:
    # Two operations a weight and row; dense weights are counted as 16-bit ones, whatever they are here.
    read_s, row_s = nbytes / machine.gpu_read_bytes_per_s, nbytes / machine.gpu_flop_per_s
    return Curve.roofline(machine.dense_launch_s, read_s, row_s)


def _expert_on(machine: Machine, weights: ExpertWeights) -> ExpertCosts:
    n_weights = sum(math.prod(m.shape) for m in weights.matrices)
    packed = sum(m.nbytes for m in weights.matrices) < LEAST_FLOAT_BYTES * n_weights
    return expert_costs(machine, weights.nbytes, 2.0 * n_weights, packed=packed)
