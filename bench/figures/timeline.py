"""What each lane does when, in a few layers of a simulated run; `fiddler simulate --timeline` draws others."""

from matplotlib.figure import Figure

from bench.figures import style
from fiddler.cli import timeline
from fiddler.lab.machine import Machine, n_slots
from fiddler.lab.shape import ModelShape
from fiddler.lab.simulation import Setting, simulate
from fiddler.lab.synthetic import SyntheticRouting
from fiddler.lab.systems import SYSTEMS
from fiddler.recording import Recording, guesses
from fiddler.trace import Trace

MODEL, MACHINE = "qwen3-30b-a3b", "rtx4090-desktop"
RESIDENT = 0.25
N_SEQUENCES, N_PROMPT, N_NEW = 2, 128, 64
LENGTH_S = 6e-3
HEIGHT = 4.4


def draw() -> Figure:
    """Return the picture of a window of some layers."""
    shape, machine = ModelShape.load(MODEL), Machine.load(MACHINE)
    slots = n_slots(shape, machine, share=RESIDENT)
    trace = Trace()
    setting = Setting(shape=shape, machine=machine, n_slots=slots, system=SYSTEMS["fiddler"])
    report = simulate(setting, _sequences(shape), trace=trace)
    about = (
        "CPU experts, copies and GPU work side by side",
        f"{MODEL} on {MACHINE}, simulated, in virtual time; {100 * RESIDENT:g} % of the experts on the GPU",
        f"{N_SEQUENCES} sequences of {N_PROMPT} + {N_NEW} tokens, made-up routing; "
        f"{report.tokens_per_s:.3g} tokens/s; of a dense part {1e3 * machine.host_layer_s:.2f} ms are the host's",
    )
    window = timeline.choose_window(trace, report.decodes_from_s, LENGTH_S)
    return style.framed(timeline.draw(trace, about, window), HEIGHT)


def _sequences(shape: ModelShape) -> list[Recording]:
    routing = SyntheticRouting(shape.n_layers, shape.n_experts, shape.top_k)
    made = [routing.sequence(i, N_PROMPT + N_NEW - 1) for i in range(N_SEQUENCES)]  # the last token is not run
    return [Recording(str(i), N_PROMPT, rows, ahead=guesses(rows, seed=i)) for i, rows in enumerate(made)]
