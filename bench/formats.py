"""Formats of experts beside each other, simulated: the same share of experts in slots, then as many as fit.

    python -m bench.formats [--shape qwen3-30b-a3b] [--machine rtx4090-desktop] [--formats bf16,int4] [--json FILE]

In virtual time, on routing made up to fit what is published, the same for every format.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from bench import machine
from bench.report import command, finish, listing, result
from fiddler.lab.machine import Machine, n_slots
from fiddler.lab.shape import ModelShape, shapes
from fiddler.lab.simulation import Setting, simulate
from fiddler.lab.synthetic import PUBLISHED, SyntheticRouting
from fiddler.recording import Recording, guesses

SEQUENCES = (1, 4)


def measure(name: str, n_sequences: int, share: float | None, options: Namespace) -> dict[str, Any]:
    """Simulate one format; `share` of the experts has slots, or as many as fit."""
    shape, where = ModelShape.load(options.shape).stored_as(name), Machine.load(options.machine)
    routing = SyntheticRouting(shape.n_layers, shape.n_experts, shape.top_k, PUBLISHED)
    made = [routing.sequence(i, options.prompt + options.new) for i in range(n_sequences)]
    recordings = [Recording(str(i), options.prompt, r, ahead=guesses(r, seed=i)) for i, r in enumerate(made)]
    slots = n_slots(shape, where, share=share)
    report = simulate(Setting(shape=shape, machine=where, n_slots=slots), recordings)
    return {
        "format": name,
        "n_sequences": n_sequences,
        "asked_share": share,
        "share": slots / shape.total_experts,
        "expert_bytes": shape.expert_bytes,
        "slot_bytes": slots * shape.expert_bytes,
        "tokens_per_s": report.tokens_per_s,
        "of_chain": report.of_chain,
        "cpu_busy": report.utilisation["cpu"],
        "gpu_busy": report.utilisation["gpu"],
        "link_busy": report.utilisation["link"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("formats", __doc__)
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=shapes(), help="a model (default: %(default)s)")
    parser.add_argument("--machine", default="rtx4090-desktop", help="a machine (default: %(default)s)")
    parser.add_argument("--formats", default="bf16,fp8,int4", help="formats (default: %(default)s)")
    parser.add_argument("--resident", type=float, default=0.25, help="share of the experts that has a slot")
    parser.add_argument("--prompt", type=int, default=48, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens each sequence makes")
    options = parser.parse_args(arguments)
    names = options.formats.split(",")
    cells = [
        measure(name, n, share, options) for share in (options.resident, None) for n in SEQUENCES for name in names
    ]
    setting = {name: getattr(options, name) for name in ("shape", "machine", "resident", "prompt", "new")}
    report = result("formats", machine.describe(), virtual=True, setting=setting, cells=cells)
    finish(options, report, listing("Formats of experts, simulated, virtual time", cells))


if __name__ == "__main__":
    main()
