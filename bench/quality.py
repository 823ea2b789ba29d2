"""What each way of running the demo model does to its predictions: bits per byte of text it is made to read.

    python -m bench.quality [--tokens 256] [--json FILE]

The text is Python's own standard library, a piece of each of some modules; the model is fed its true tokens, one a
step, eight sequences side by side. The paths differ in device, dtype, store and deferral; those that promise the
same bits must show the same number. Deferral is refused below 6 experts a token; here it is forced on a model with
2, so it holds back half of what a token visits: the worst case, not the case it is meant for.
"""

import argparse
import inspect
import textwrap
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from math import log
from pathlib import Path

import anyio
import torch

from bench import machine
from bench.report import heading, table, write_json
from fiddler import DEMO
from fiddler.config import EngineConfig
from fiddler.devices.kernels import Kernels
from fiddler.engine.assemble import Span
from fiddler.engine.rig import assemble_rig
from fiddler.models.kv import SequenceKV
from fiddler.models.loaded import load

MODULES = ("textwrap", "argparse", "heapq", "bisect", "statistics", "fractions", "shutil", "string")
PATHS: dict[str, EngineConfig] = {
    "cpu": EngineConfig(device="cpu"),
    "cpu, packed": EngineConfig(device="cpu", store="packed"),
    "cpu, float32": EngineConfig(device="cpu", dtype="float32"),
    "sim, a quarter resident": EngineConfig(device="sim:rtx4090-desktop"),
    "sim, none resident": EngineConfig(device="sim:rtx4090-desktop", slots=0),
    "sim, two waves": EngineConfig(device="sim:rtx4090-desktop", waves="two"),
}
DEFERRED = "cpu, one of two experts deferred (lossy)"


@dataclass(slots=True, eq=False)
class Reading:
    """A sequence whose tokens are known."""

    ids: list[int]
    past: SequenceKV = field(default_factory=SequenceKV)

    def tokens(self, start: int, stop: int) -> Sequence[int]:
        """Return the true tokens."""
        return self.ids[start:stop]


async def bits(config: EngineConfig, texts: Sequence[list[int]], n_deferred: int = 0) -> float:
    """Return the bits that the model gives all tokens of `texts` but each one's first."""
    loaded = load(DEMO, config)
    rig = assemble_rig(loaded, Kernels(), config)
    rig.steps._experts = replace(rig.steps._experts, n_deferred=n_deferred)
    await rig.runner.preload()
    readings = [Reading(ids) for ids in texts]
    total = 0.0
    for i in range(len(texts[0]) - 1):
        outcomes = await rig.steps.run([Span(reading, i, i + 1, last=True) for reading in readings])  # type: ignore[arg-type]
        for reading, outcome in zip(readings, outcomes, strict=True):
            if outcome.error is not None:
                raise outcome.error
            assert outcome.logits is not None
            total -= float(torch.log_softmax(outcome.logits.float(), -1)[reading.ids[i + 1]])
    await rig.aclose()
    return total / log(2.0)


def main() -> None:
    parser: ArgumentParser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=256, help="of each module")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    text = load(DEMO, EngineConfig()).text
    sources = [textwrap.dedent(inspect.getsource(import_module(name))) for name in MODULES]
    texts = [text.encode(source[:20_000])[: options.tokens] for source in sources]
    n_bytes = sum(len(text.tokenizer.decode(ids[1:]).encode()) for ids in texts)
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    with torch.inference_mode():
        for name, config in PATHS.items():
            found[name] = anyio.run(bits, config, texts) / n_bytes
        found[DEFERRED] = anyio.run(bits, PATHS["cpu"], texts, 1) / n_bytes
    where = machine.describe()
    rows = [(name, f"{value:.4f}", f"{100 * (value / found['cpu'] - 1):+.2f} %") for name, value in found.items()]
    print(heading(where))
    print(table("Bits per byte of the demo model", ("path", "bits/byte", "against cpu"), rows))
    if options.json is not None:
        write_json(options.json, {"machine": where, "modules": MODULES, "n_bytes": n_bytes, "bits_per_byte": found})


if __name__ == "__main__":
    main()
