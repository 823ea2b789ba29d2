"""The pictures of README and docs, all made by one command: `python -m bench.figures`.

Each is drawn from committed results, a committed trace or a simulation in virtual time, so that the same sources
give the same bytes. To add one, write its file and name it in `FIGURES`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from bench.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "images"
FIGURES: Mapping[str, str] = {
    "latency": "speed of Fiddler and every peer, measured",
    "roofline": "experts on the CPU, beside what memory and matrix units allow, measured",
    "timeline": "what each lane does when, simulated",
    "systems": "speed by system, simulated",
    "resident": "speed by the share of experts on the GPU, simulated",
    "replay": "reads by cache policy and size, replayed",
}
"""What a picture shows, by the name of its file and of its module here."""


def draw(name: str) -> "Figure":
    """Return a picture. Raises `ValueError` for a name that is none of `FIGURES`."""
    if name not in FIGURES:
        raise ValueError(f"{name!r} is none of the pictures: {', '.join(FIGURES)}")
    make: Callable[[], Figure] = import_module(f"bench.figures.{name}").draw
    with style.applied():
        return make()


def write(names: Iterable[str], folder: Path) -> Iterator[Path]:
    """Write pictures into a folder that exists; yield each file. Raises `ValueError` as `draw` does."""
    for name in names:
        yield style.save(draw(name), folder / f"{name}.svg")
