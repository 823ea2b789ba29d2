"""Where two waves gain: decoding speed and time to first token, waves chosen by prediction against one wave always.

    python -m bench.waves [--prompt 64] [--new 48] [--resident 0.25] [--json FILE]

Everything is simulated, in virtual time, on made-up routing (`fiddler.lab.synthetic`): shapes and machines are
those that ship with Fiddler, experts in bf16, the same sequences on both sides.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench import machine
from bench.policies import MODELS
from bench.report import command, finish, listing, result
from fiddler.config import WaveMode
from fiddler.lab.machine import Machine, n_slots
from fiddler.lab.shape import FLOATS, ModelShape
from fiddler.lab.simulation import Report, Setting, simulate
from fiddler.lab.synthetic import SyntheticRouting
from fiddler.lab.systems import SYSTEMS
from fiddler.recording import Recording, guesses

MACHINES = ("fiddler-env1", "fiddler-env2", "rtx4090-desktop", "h100-server")
SEQUENCES = (1, 2, 8, 16)


def measure(shape: ModelShape, name: str, n_sequences: int, options: Namespace) -> dict[str, Any]:
    """Simulate one cell both ways; `of_bound` is of the chosen waves: how near to what their reads allow."""
    where = Machine.load(name)
    routing = SyntheticRouting(shape.n_layers, shape.n_experts, shape.top_k)
    made = [routing.sequence(i, options.prompt + options.new) for i in range(n_sequences)]
    prompts = [Recording(str(i), options.prompt, rows, ahead=guesses(rows, seed=i)) for i, rows in enumerate(made)]

    def run(waves: WaveMode) -> Report:
        slots = n_slots(shape, where, share=options.resident)
        system = replace(SYSTEMS["fiddler"], waves=waves)
        return simulate(Setting(shape=shape, machine=where, n_slots=slots, system=system), prompts)

    one, auto = run("one"), run("auto")
    return {
        "model": shape.name,
        "machine": name,
        "n_sequences": n_sequences,
        "one_tokens_per_s": one.tokens_per_s,
        "auto_tokens_per_s": auto.tokens_per_s,
        "one_first_token_s": one.first_token_s,
        "auto_first_token_s": auto.first_token_s,
        "of_bound": auto.of_bound,
        "n_steps_in_two_waves": auto.n_steps_in_two_waves,
        "prediction_error": auto.prediction_error,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("waves", __doc__)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=48, help="tokens each sequence makes")
    parser.add_argument("--resident", type=float, default=0.25, help="share of the experts that has a slot")
    options = parser.parse_args(arguments)
    models = [ModelShape.load(name).stored_as(FLOATS) for name in MODELS]
    cells = [measure(shape, name, n, options) for shape in models for name in MACHINES for n in SEQUENCES]
    setting = {"prompt": options.prompt, "new": options.new, "resident": options.resident}
    report = result("waves", machine.describe(), virtual=True, setting=setting, cells=cells)
    gains = [cell["auto_tokens_per_s"] / cell["one_tokens_per_s"] for cell in cells]
    shown = listing("One wave or two, simulated, virtual time", cells)
    finish(options, report, shown, f"\nGains are {min(gains):.4f} to {max(gains):.4f}")


if __name__ == "__main__":
    main()
