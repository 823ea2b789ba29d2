"""The virtual machine held against the world: published speeds, predicted from constants written down before.

    python -m bench.world [--routing FILE] [--table TEXT] [--json FILE]

Everything is simulated, in virtual time. What a system costs its host, what its kernels read and how it places
experts stands in `world.json`, each with its source, as do the speeds to be predicted. Beside a prediction stands
what data sheets alone would say (no efficiency, no host), and the rate at which the CPU would have to read for the
prediction to be exact, as a share of the data sheet's DRAM bandwidth. `--routing` takes counts of Mixtral's visits.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench import machine
from bench.report import command, finish, result, table
from fiddler.cache.policy import Key
from fiddler.lab.machine import FIGURES, Machine
from fiddler.lab.policies import by_popularity
from fiddler.lab.shape import DENSE_BYTES, ModelShape
from fiddler.lab.simulation import Report, Setting, simulate
from fiddler.lab.synthetic import Habits, SyntheticRouting, read_counts
from fiddler.lab.systems import System, system
from fiddler.recording import Recording, guesses

WORLD = Path(__file__).parent / "world.json"
OTHER_TEXT = range(100, 116)
"""The sequences whose visits a static placement goes by; none of them is run."""
OTHER_TOKENS = 256
NEAR = 0.002
"""How near a speed found by inversion must come."""
HOST = [name for name in FIGURES if name.endswith(("launch_s", "dispatch_s", "layer_s", "fixed_s"))]
STREAMED = "deepspeed-mii"
"""The one system that is not simulated: it copies all weights for every token, and nothing else counts."""

Kind = Literal["assumed", "data sheet"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One published speed, in tokens per second, and what it was measured with."""

    table: str
    system: str
    machine: str
    model: str
    slots: int
    lengths: str
    """The name of a list of (prompt, made) tokens; the speed is the mean over it."""
    metric: Literal["decode", "end-to-end"]
    published: float
    source: str
    gpu_layers: int | None = None
    """Layers that the GPU has whole, of a system that runs the others on the CPU with all they have."""


@dataclass(frozen=True, slots=True)
class World:
    """`world.json`, its constants without their sources."""

    constants: Mapping[str, Any]
    machines: Mapping[str, Mapping[str, Any]]
    models: Mapping[str, Mapping[str, Any]]
    systems: Mapping[str, Mapping[str, Any]]
    lengths: Mapping[str, Any]
    cells: tuple[Cell, ...]

    @classmethod
    def load(cls, file: Path = WORLD) -> "World":
        """Read the file."""
        content = json.loads(file.read_text(encoding="utf-8"))
        named = {key: _values(content[key]) for key in ("constants", "machines", "models", "systems", "lengths")}
        return cls(**named, cells=tuple(Cell(**cell) for cell in content["cells"]))

    def shape(self, model: str) -> ModelShape:
        """Return a model's shape with the weights that it was run with."""
        values = self.models[model]
        shape = ModelShape.load(values.get("shape", model))
        return replace(shape, name=model, bytes_per_weight=values["bytes_per_weight"])

    def cpu_share(self, cell: Cell) -> float | None:
        """Return what the system's kernels read, as a share of the DRAM bandwidth; `None` if they read nothing."""
        few_bits = self.models[cell.model]["bytes_per_weight"] < DENSE_BYTES
        share = self.systems[cell.system].get("cpu_share_4bit" if few_bits else "cpu_share")
        return None if share is None else float(share)


def _values(found: Any) -> Any:
    if not isinstance(found, dict):
        return found
    return found["value"] if "value" in found else {key: _values(value) for key, value in found.items()}


@dataclass(frozen=True, slots=True)
class Prediction:
    """A speed in virtual tokens per second, and the share of decoding's visits that ran from a slot."""

    tokens_per_s: float
    hits: float


@dataclass(frozen=True, slots=True)
class Row:
    """A cell and all that is said about it."""

    cell: Cell
    predicted: float
    error: float
    """`predicted / published - 1`."""
    of_data_sheet: float
    hits: float
    cpu_share: float | None
    implied_cpu_share: float | None
    """`None` where no CPU is used, none would be fast enough, or for a mean over lengths."""
    figures: Mapping[str, float]


@dataclass(slots=True)
class Predictor:
    """Predicts cells. `counts` are real visits to Mixtral's experts, `[L, E]`, or `None`."""

    world: World
    counts: Any = None

    def row(self, cell: Cell) -> Row:
        """Return everything about one cell."""
        share = self.world.cpu_share(cell)
        found = self.predict(cell, "assumed", share)
        where = self.machine(cell, "assumed", share)
        implied = None
        if share is not None and len(self.world.lengths[cell.lengths]) == 1:
            implied = invert(lambda s: self.predict(cell, "assumed", s).tokens_per_s, cell.published, share)
        return Row(
            cell,
            found.tokens_per_s,
            found.tokens_per_s / cell.published - 1.0,
            self.predict(cell, "data sheet", None).tokens_per_s,
            found.hits,
            share,
            implied,
            {name: getattr(where, name) for name in sorted(FIGURES)},
        )

    def machine(self, cell: Cell, kind: Kind, share: float | None) -> Machine:
        """Return the machine as a system finds it; `share` is of the DRAM bandwidth, for the CPU's kernels."""
        base, sheet = Machine.load(cell.machine), self.world.machines[cell.machine]
        of_system = self.world.systems[cell.system]
        passes = of_system.get("link_passes", 1)
        if kind == "data sheet":
            nothing = dict.fromkeys(HOST, 0.0)
            rates = {name: sheet[name] for name in FIGURES & sheet.keys()}
            where = replace(base, **nothing, **rates, cpu_read_bytes_per_s=sheet["dram_bytes_per_s"])
            sustained = sheet["dram_bytes_per_s"]
        else:
            own = {name: of_system[name] for name in FIGURES & of_system.keys()}
            read = base.cpu_read_bytes_per_s if share is None else share * sheet["dram_bytes_per_s"]
            where = replace(base, **own, cpu_read_bytes_per_s=read)
            sustained = self.world.constants["sustained_share"] * sheet["dram_bytes_per_s"]
        link = where.link_bytes_per_s / passes
        left = max(sustained - link, 1.0)
        slowdown = max(1.0, min(where.cpu_read_bytes_per_s, sustained) / left)
        host_s = where.host_layer_s + self._dense_on_cpu_s(cell, where)
        if kind == "assumed":
            host_s += of_system.get("host_resident_s", 0.0) * cell.slots / self.world.shape(cell.model).n_layers
        return replace(where, link_bytes_per_s=link, cpu_slowdown_beside_link=slowdown, host_layer_s=host_s)

    def _dense_on_cpu_s(self, cell: Cell, where: Machine) -> float:
        """Return what a layer takes longer, on average, because some layers' attention runs on the CPU."""
        if cell.gpu_layers is None:
            return 0.0
        shape = self.world.shape(cell.model)
        on_cpu = 1.0 - cell.gpu_layers / shape.n_layers
        cpu_s = shape.dense_weights * shape.bytes_per_weight / where.cpu_read_bytes_per_s
        return on_cpu * max(0.0, cpu_s - shape.dense_bytes / where.gpu_read_bytes_per_s)

    def predict(self, cell: Cell, kind: Kind, share: float | None) -> Prediction:
        """Return the mean over the cell's lengths."""
        where, shape = self.machine(cell, kind, share), self.world.shape(cell.model)
        if cell.system == STREAMED:
            nbytes = shape.resident_bytes + shape.total_experts * shape.expert_bytes
            return Prediction(where.link_bytes_per_s / nbytes, 0.0)
        setting = Setting(
            shape=shape,
            machine=where,
            n_slots=cell.slots,
            system=self._placed(cell),
            popular=self._popular(cell.model),
        )
        found = [self._run(setting, cell, *lengths) for lengths in self.world.lengths[cell.lengths]]
        speeds, hits = zip(*((one.tokens_per_s, one.hits) for one in found), strict=True)
        return Prediction(float(np.mean(speeds)), float(np.mean(hits)))

    def _run(self, setting: Setting, cell: Cell, n_prompt: int, n_new: int) -> Prediction:
        # The prompt makes the first token, so the last one made is never run.
        experts = self._routing(cell.model).sequence(0, n_prompt + n_new - 1)
        report = simulate(setting, [Recording(cell.table, n_prompt, experts, ahead=guesses(experts))])
        visits = report.n_hits + report.n_cpu + report.n_fetches
        return Prediction(_speed(report, cell.metric, n_new), report.n_hits / visits if visits else 0.0)

    def _placed(self, cell: Cell) -> System:
        own = self.world.systems[cell.system]
        return replace(system(cell.system), **{name: own[name] for name in ("order", "prefetch") if name in own})

    def _routing(self, model: str) -> SyntheticRouting:
        shape = self.world.shape(model)
        if self.counts is not None and self.counts.shape == (shape.n_layers, shape.n_experts):
            return SyntheticRouting.counted(self.counts, shape.top_k)
        habits = Habits(skew=self.world.models[model]["skew"])
        return SyntheticRouting(shape.n_layers, shape.n_experts, shape.top_k, habits)

    def _popular(self, model: str) -> tuple[Key, ...]:
        if self.counts is not None:
            return _popularity(self._routing(model))
        return _made_up(self.world.shape(model), self.world.models[model]["skew"])


@lru_cache
def _made_up(shape: ModelShape, skew: float) -> tuple[Key, ...]:
    return _popularity(SyntheticRouting(shape.n_layers, shape.n_experts, shape.top_k, Habits(skew=skew)))


def _popularity(routing: SyntheticRouting) -> tuple[Key, ...]:
    visited = np.zeros((routing.n_layers, routing.n_experts))
    for number in OTHER_TEXT:
        for chosen in routing.sequence(number, OTHER_TOKENS):
            np.add.at(visited, (np.arange(routing.n_layers)[:, None], chosen), 1.0)
    return by_popularity(visited.tolist())


def _speed(report: Report, metric: str, n_new: int) -> float:
    if metric == "decode":
        return report.tokens_per_s
    return n_new / (report.first_token_s + report.decode_s)


def invert(speed: Callable[[float], float], wanted: float, share: float) -> float | None:
    """Return the share of the DRAM bandwidth at which `speed` is as wanted; `None` if none up to 100 is.

    Time goes nearly straight with the inverse of the rate, so a secant through `1 / share` arrives in few steps.
    """
    points = [(1.0 / s, 1.0 / speed(s)) for s in (share, 2.0 * share)]
    for _ in range(12):
        (x0, y0), (x1, y1) = points[-2:]
        if abs(y1 * wanted - 1.0) <= NEAR:
            return 1.0 / x1
        x = x1 + (1.0 / wanted - y1) * (x1 - x0) / (y1 - y0) if y1 != y0 else 0.0
        if x < 0.01:
            return None
        points.append((x, 1.0 / speed(1.0 / x)))
    return None


def order_right(speeds: Sequence[tuple[float, float]]) -> bool:
    """Whether predicted speeds stand in the order of the published ones; equal published ones may stand either way.

    Each is (published, predicted).
    """
    return all((a[0] - b[0]) * (a[1] - b[1]) > 0.0 for a in speeds for b in speeds if a[0] != b[0])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("world", __doc__)
    parser.add_argument("--routing", type=Path, help="counts of visits to Mixtral's experts, by layer")
    parser.add_argument("--table", default="", help="only tables whose title has this in it")
    options = parser.parse_args(arguments)
    world = World.load()
    predictor = Predictor(world, None if options.routing is None else read_counts(options.routing))
    tables: dict[str, list[Row]] = {}
    orders: dict[str, bool] = {}
    header = ("system", "published", "predicted", "error", "data sheet", "hits", "CPU share", "implied")
    for title in dict.fromkeys(cell.table for cell in world.cells if options.table in cell.table):
        tables[title] = rows = [predictor.row(cell) for cell in world.cells if cell.table == title]
        orders[title] = order_right([(row.cell.published, row.predicted) for row in rows])
        right = "right" if orders[title] else "WRONG"
        print(table(f"{title}: order {right}", header, map(_line, rows)), flush=True)
    routing = "made up" if options.routing is None else options.routing.name
    cells = [row for rows in tables.values() for row in rows]
    finish(
        options, result("world", machine.describe(), virtual=True, routing=routing, order_right=orders, cells=cells)
    )


def _line(row: Row) -> tuple[str, ...]:
    shares = [f"{share:.2f}" if share is not None else "-" for share in (row.cpu_share, row.implied_cpu_share)]
    speeds = [f"{speed:.2f}" for speed in (row.cell.published, row.predicted)]
    return (row.cell.system, *speeds, f"{row.error:+.0%}", f"{row.of_data_sheet:.2f}", f"{row.hits:.2f}", *shares)


if __name__ == "__main__":
    main()
