"""Where two waves gain: decoding speed and time to first token, waves chosen by prediction against one wave always.

    python -m bench.waves [--prompt 64] [--new 48] [--resident 0.25] [--json FILE]

Everything is simulated, in virtual time, on made-up routing (`fiddler.cache.synthetic`): shapes and machines are
those that ship with Fiddler, the same sequences on both sides.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from bench import machine
from bench.report import heading, result, table, write_json
from fiddler.cache.recorded import Recording, guesses
from fiddler.cache.synthetic import SyntheticRouting
from fiddler.config import WaveMode
from fiddler.cost.machine import Machine, n_slots
from fiddler.cost.shape import ModelShape, shapes
from fiddler.engine.simulation import Report, Setting, simulate
from fiddler.scheduler.systems import SYSTEMS

MACHINES = ("fiddler-env1", "fiddler-env2", "rtx4090-desktop", "h100-server")
SEQUENCES = (1, 2, 8, 16)


@dataclass(frozen=True, slots=True)
class Cell:
    """One model on one machine with some sequences. Speeds are virtual tokens per second."""

    model: str
    machine: str
    n_sequences: int
    one_tokens_per_s: float
    auto_tokens_per_s: float
    one_first_token_s: float
    auto_first_token_s: float
    of_bound: float
    """Of the chosen waves: the physical bound's share of the time taken."""
    n_steps_in_two_waves: int
    prediction_error: float

    @property
    def gain(self) -> float:
        """How many times faster than one wave always."""
        return self.auto_tokens_per_s / self.one_tokens_per_s


def measure(shape: ModelShape, name: str, n_sequences: int, options: argparse.Namespace) -> Cell:
    """Simulate one cell both ways."""
    where = Machine.load(name)
    routing = SyntheticRouting(shape.n_layers, shape.n_experts, shape.top_k)
    made = [routing.sequence(i, options.prompt + options.new) for i in range(n_sequences)]
    prompts = [Recording(str(i), options.prompt, rows, ahead=guesses(rows, seed=i)) for i, rows in enumerate(made)]

    def run(waves: WaveMode) -> Report:
        slots = n_slots(shape, where, share=options.resident)
        system = replace(SYSTEMS["fiddler"], waves=waves)
        return simulate(Setting(shape=shape, machine=where, n_slots=slots, system=system), prompts)

    one, auto = run("one"), run("auto")
    return Cell(
        model=shape.name,
        machine=name,
        n_sequences=n_sequences,
        one_tokens_per_s=one.tokens_per_s,
        auto_tokens_per_s=auto.tokens_per_s,
        one_first_token_s=one.first_token_s,
        auto_first_token_s=auto.first_token_s,
        of_bound=auto.of_bound,
        n_steps_in_two_waves=auto.n_steps_in_two_waves,
        prediction_error=auto.prediction_error,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=48, help="tokens each sequence makes")
    parser.add_argument("--resident", type=float, default=0.25, help="share of the experts that has a slot")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    models = [ModelShape.load(name) for name in shapes()]
    cells = [measure(shape, name, n, options) for shape in models for name in MACHINES for n in SEQUENCES]
    rows = [
        (
            f"{cell.model} on {cell.machine}, {cell.n_sequences}",
            f"{cell.one_tokens_per_s:.2f}",
            f"{cell.auto_tokens_per_s:.2f}",
            f"{cell.gain:.3f}",
            f"{cell.one_first_token_s:.2f}",
            f"{cell.auto_first_token_s:.2f}",
            f"{cell.of_bound:.2f}",
        )
        for cell in cells
    ]
    header = ("sequences", "one: tok/s", "chosen: tok/s", "ratio", "one: first s", "chosen: first s", "of bound")
    print(table("One wave or two, simulated, virtual time", header, rows))
    setting = {"prompt": options.prompt, "new": options.new, "resident": options.resident}
    where = machine.describe()
    print(f"\nLeast ratio {min(cell.gain for cell in cells):.4f}, most {max(cell.gain for cell in cells):.4f}")
    print(heading(where))
    if options.json is not None:
        write_json(options.json, result("waves", where, virtual=True, setting=setting, cells=cells))


if __name__ == "__main__":
    main()
