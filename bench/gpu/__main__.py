"""Everything that the CUDA device promises, measured by one command on any machine with an NVIDIA GPU.

    python -m bench.gpu [--quick] [--only PART,PART] [--out FOLDER] [--models NAME,NAME] [--budgets 12,24,48]

Each part is written to FOLDER/gpu-PART-LABEL.json when it is done, and while it runs, so that a run that is cut off
keeps what it has. What is no result lies beside them in FOLDER/gpu-LABEL: a machine description, a Chrome trace and
a picture of a timeline. A part that fails says so in its file, and the others go on. The exit code is 0 where all
parts ran, whatever they found, 1 where one failed, and 2 where there is no GPU.
"""

import argparse
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import transformers

from bench import machine
from bench.gpu.context import Context, said
from bench.gpu.decode import decode
from bench.gpu.facts import facts
from bench.gpu.models import NAMES, Shelf
from bench.gpu.resident import resident
from bench.gpu.sizes import FULL, QUICK, Sizes
from bench.gpu.summary import summary
from bench.gpu.timeline import timeline
from bench.report import heading
from fiddler.errors import ConfigError
from fiddler.gpu import cuda

Part = Callable[[Context], Mapping[str, Any]]
PARTS: Mapping[str, Part] = {
    "facts": facts,
    "decode": decode,
    "timeline": timeline,  # with the model that decoding has left in memory
    "resident": resident,
    "summary": summary,
}
NO_GPU = "bench.gpu measures an NVIDIA GPU, and torch sees none here"
RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        gpu = cuda.open_gpu()
    except ConfigError as error:
        print(f"{NO_GPU}: {error}", file=sys.stderr)
        return 2
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gpu.enter()
    label = options.label or slug(gpu.name)
    with TemporaryDirectory(prefix="fiddler-bench-") as scratch:
        shelf = Shelf(gpu)
        ctx = Context(gpu, _sizes(options), label, options.out, Path(scratch), shelf)
        print(f"{gpu.name}, {gpu.memory().total / 2**30:.0f} GiB\n{heading(machine.describe())}", flush=True)
        try:
            return run(ctx, {name: PARTS[name] for name in PARTS if name in options.only})
        finally:
            shelf.drop()


def run(ctx: Context, parts: Mapping[str, Part]) -> int:
    """Run parts one after the other; returns 1 where one failed, otherwise 0."""
    code = 0
    for name, part in parts.items():
        began_s = perf_counter()
        print(f"\n{name} …", flush=True)
        try:
            ctx.keep(name, **part(ctx), complete=True)
        except Exception as error:  # the other parts are worth having without it
            traceback.print_exc(file=sys.stderr)
            ctx.keep(name, error=said(error))
            code = 1
        ctx.shelf.tidy()
        print(f"{name} took {perf_counter() - began_s:.0f} s, written to {ctx.file(name)}", flush=True)
    return code


def slug(name: str) -> str:
    """Return a GPU's name as a part of a file's: small letters, digits and dashes."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if word != "nvidia") or "gpu"


def _sizes(options: argparse.Namespace) -> Sizes:
    sizes = QUICK if options.quick else FULL
    asked = {name: value for name, value in vars(options).items() if name in Sizes.__dataclass_fields__}
    return replace(sizes, **{name: value for name, value in asked.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="enough to see that everything works")
    parser.add_argument("--only", type=_parts, default=tuple(PARTS), help=f"of {','.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="default: bench/results")
    parser.add_argument("--label", type=slug, help="names the files (default: the GPU's name)")
    parser.add_argument("--models", type=_names, help=f"NAME[:layers=N],… of {', '.join(NAMES)}")
    parser.add_argument("--budgets", dest="budgets_gib", type=_numbers, help="GiB of GPU memory, N,N,…")
    parser.add_argument("--systems", type=_names, help="as `fiddler simulate --list` has them, with fiddler")
    parser.add_argument("--minutes", type=float, help="that the run may take")
    parser.add_argument("--rounds", type=int, help="turns of every system")
    parser.add_argument("--chunk-tokens", type=int, help="of a prompt, in one step")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def _parts(text: str) -> tuple[str, ...]:
    names = _names(text)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(PARTS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
