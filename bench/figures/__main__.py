"""Write the pictures of README and docs: `python -m bench.figures [--only NAME …] [--output DIR]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.figures import FIGURES, FOLDER, write


def main(arguments: Sequence[str] | None = None) -> None:
    known = "\n".join(f"  {name:10} {shows}" for name, shows in FIGURES.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench.figures",
        description="Write the pictures of README and docs.",
        epilog=f"pictures:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="NAME", help="these; all"
    )
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="the folder; docs/images")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for file in write(options.only, options.output):
        print(f"{file} ({file.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
