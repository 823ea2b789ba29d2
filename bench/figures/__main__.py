"""Write the pictures of README and docs: `python -m bench.figures [--only NAME …] [--output DIR]`.

Each is drawn from committed results, a committed trace or a simulation in virtual time, so that the same sources
give the same bytes. To add one, write its file and name it in `FIGURES`.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench.figures import latency, replay, resident, roofline, style, systems, timeline

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "images"
FIGURES: Mapping[str, Callable[[], Figure]] = {
    "latency": latency.draw,
    "roofline": roofline.draw,
    "timeline": timeline.draw,
    "systems": systems.draw,
    "resident": resident.draw,
    "replay": replay.draw,
}
"""What draws a picture, by the name of its file."""


def write(names: Iterable[str], folder: Path) -> Iterator[Path]:
    """Write pictures into a folder that exists; yield each file."""
    for name in names:
        with style.applied():
            yield style.save(FIGURES[name](), folder / f"{name}.svg")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="NAME")
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="the folder; docs/images")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for file in write(options.only, options.output):
        print(f"{file} ({file.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
