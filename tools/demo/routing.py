"""Command line: record where the demo checkpoint routes held-out text of its domains."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import anyio

from fiddler import Engine, EngineConfig
from fiddler.lab.traces import save
from fiddler.recording import RoutingTrace
from tools.demo import corpus, windows
from tools.demo.__main__ import DEFAULT_CACHE, SHIPPED

OUT = Path(__file__).resolve().parents[2] / "bench" / "traces" / "demo.safetensors"
SEQUENCES = 4
PROMPT_TOKENS = 64
DECODE_TOKENS = 192


def main() -> None:
    """Cut windows from each domain's held-out text, run them, and write their routing."""
    options = _options()
    options.cache.mkdir(parents=True, exist_ok=True)
    text = corpus.load(options.cache)
    trace = anyio.run(_record, options.checkpoint, text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save(options.out, trace)
    print(f"{options.out}: {len(trace.recordings)} sequences, {options.out.stat().st_size:,} bytes")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.routing", description=main.__doc__)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder for packages, as of tools.demo")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED, help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, default=OUT, help="the file to write")
    return parser.parse_args()


async def _record(checkpoint: Path, text: corpus.Corpus) -> RoutingTrace:
    """Run one window at a time, whole; how a causal model routes a token does not depend on what follows it."""
    names = []
    # The same on every machine, up to the last bits of its arithmetic.
    config = EngineConfig(record=True, kernels="linear", device="cpu")
    async with Engine(checkpoint, config) as engine:
        for domain in corpus.DOMAINS:
            tokens = windows.encode(engine.tokenizer, corpus.text_of(text.held_out, domain))
            for number, window in enumerate(_windows(tokens)):
                await engine.generate(window, max_new_tokens=1)  # which is not run
                names.append(f"{domain}/{number}")
        trace = engine.routing()
    recordings = zip(names, trace.recordings, strict=True)
    named = [replace(recording, name=name, n_prompt=PROMPT_TOKENS) for name, recording in recordings]
    return replace(trace, recordings=tuple(named))


def _windows(tokens: list[int]) -> list[list[int]]:
    """Return windows that begin at even distances."""
    length = PROMPT_TOKENS + DECODE_TOKENS
    starts = [i * (len(tokens) - length) // SEQUENCES for i in range(SEQUENCES)]
    return [tokens[start : start + length] for start in starts]


if __name__ == "__main__":
    main()
