"""Reads by cache policy and size: what `fiddler replay bench/traces/demo.safetensors --plot` draws."""

from pathlib import Path

from matplotlib.figure import Figure

from bench.figures import style
from fiddler.cli import curves
from fiddler.cli.notes import Notes
from fiddler.cli.replay import CacheOptions, replays
from fiddler.lab.traces import load

TRACE = Path(__file__).resolve().parents[1] / "traces" / "demo.safetensors"
CACHE = CacheOptions()
HEIGHT = 5.2


def draw() -> Figure:
    """Return the picture of every policy."""
    return style.framed(curves.draw(replays([(TRACE.name, load(TRACE))], CACHE, Notes(quiet=True))), HEIGHT)
