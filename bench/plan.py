"""How long planning a layer takes, and how near its plans come to the best there are.

    python -m bench.plan [--loads 8,32,128] [--layers 200] [--repeats 20] [--seeds 3000] [--json FILE]

The layers are random, the same ones every time, of the generator that the tests use; the best plan is found by
running every division of the loads on `Lanes`. A layer's time is its shortest of several, in turns with the other
layers as a model's layers take turns.
"""

from collections.abc import Sequence
from statistics import mean, median
from time import perf_counter
from typing import Any

from bench import machine
from bench.report import command, finish, listing, result
from fiddler.scheduler.plan import Planner, all_cpu, all_fetch, best_cut
from tests.scheduler.instances import Instance, instances
from tests.scheduler.oracle import best_s

PLANNERS: dict[str, Planner] = {"best_cut": best_cut, "all_cpu": all_cpu, "all_fetch": all_fetch}


def plan_times(n_loads: int, n_layers: int, repeats: int) -> dict[str, float]:
    """Measure `best_cut` on layers of `n_loads` experts."""
    layers = instances(range(n_layers), n_loads)
    times = sorted(map(min, zip(*([_seconds(given) for given in layers] for _ in range(repeats)), strict=True)))
    found = {"median_us": median(times), "p90_us": times[round(0.9 * (n_layers - 1))], "worst_us": times[-1]}
    return {"n_loads": n_loads, **{name: 1e6 * seconds for name, seconds in found.items()}}


def _seconds(given: Instance) -> float:
    started = perf_counter()
    given.plan(best_cut)
    return perf_counter() - started


def ratios(n_seeds: int) -> list[dict[str, Any]]:
    """Compare every planner with the best plan, on layers of one to ten experts."""
    layers = instances(range(n_seeds))
    best = [best_s(given) for given in layers]
    found = []
    for name, planner in PLANNERS.items():
        each = sorted(given.plan(planner).predicted_s / s for given, s in zip(layers, best, strict=True))
        p99 = each[round(0.99 * (n_seeds - 1))]
        found.append({"planner": name, "mean": mean(each), "p99": p99, "worst": each[-1]})
    return found


def measure(loads: Sequence[int], n_layers: int, repeats: int, n_seeds: int) -> dict[str, Any]:
    """Measure everything and return the report."""
    return result(
        "plan",
        machine.describe(),
        virtual=False,
        settings={"layers": n_layers, "repeats": repeats, "seeds": n_seeds},
        times=[plan_times(n, n_layers, repeats) for n in loads],
        ratios=ratios(n_seeds),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("plan", __doc__)
    parser.add_argument("--loads", default="8,32,128", help="experts of a layer (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=200, help="timed of each size (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3000, help="compared with the best (default: %(default)s)")
    options = parser.parse_args(arguments)
    loads = [int(n) for n in options.loads.split(",")]
    report = measure(loads, options.layers, options.repeats, options.seeds)
    ratios_title = f"Makespan / best, {options.seeds} layers of 1 to 10 loads"
    finish(options, report, listing("Planning a layer", report["times"]), listing(ratios_title, report["ratios"]))


if __name__ == "__main__":
    main()
