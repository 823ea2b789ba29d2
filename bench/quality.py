"""The guard of quality: what each way of running the demo model does to its predictions of text it is made to read.

    python -m bench.quality [--tokens 256] [--json FILE]

The text is Python's own standard library, a piece of each of some modules, eight sequences side by side; the model
is fed its true tokens. Every path makes a promise, relative to another path: the same bits for every token; or
another rounding, or a loss, which change the perplexity by at most so much. The bounds are for 256 tokens a module;
of fewer the noise is larger. Where a promise is broken the bench says so and exits with 1.

Deferral is refused below 6 experts a token; here it is forced on a model with 2, so it holds back half of what a
token visits: the worst case, not the case it is meant for.
"""

import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import exp, log
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.quality_paths import BASE, PATHS, Path, Promise, Texts
from bench.report import command, finish, result, table
from fiddler import DEMO
from fiddler.text.tokenizer import Text

MODULES = ("textwrap", "argparse", "heapq", "bisect", "statistics", "fractions", "shutil", "string")
CHARACTERS_A_TOKEN = 16
"""No module's text needs more; a longer piece than the model's context brings a warning."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a path did, and what it promised."""

    bits_per_byte: float
    perplexity: float
    """Per token. Of a path that reads chunks only the tokens after chunks count."""
    n_tokens: int
    against_cpu: float
    """Relative change of the perplexity of the same tokens."""
    promise: Promise
    like: str
    """The path it is relative to."""
    against_like: float
    bound: float
    """On the size of `against_like`."""
    n_different: int
    """Tokens whose log-probabilities are not the same bits as those of `like`."""

    @property
    def kept(self) -> bool:
        """Whether the promise is."""
        if self.promise == "same bits":
            return self.n_different == 0
        return abs(self.against_like) <= self.bound


def texts_of(n_tokens: int) -> tuple[Texts, int]:
    """Return the first tokens of every module, and the bytes of all of them but each one's first."""
    text = Text.open(DEMO)
    sources = (textwrap.dedent(inspect.getsource(import_module(name))) for name in MODULES)
    texts = [text.encode(source[: CHARACTERS_A_TOKEN * n_tokens])[:n_tokens] for source in sources]
    assert text.tokenizer is not None
    read = [str(text.tokenizer.decode(ids[1:])) for ids in texts]
    return texts, sum(len(one.encode()) for one in read)


def measure(paths: Mapping[str, Path], texts: Texts, n_bytes: int) -> dict[str, Outcome]:
    """Read the texts by every path; `BASE`, and whatever a path is to be like, comes before it."""
    read: dict[str, Tensor] = {}
    outcomes: dict[str, Outcome] = {}
    bytes_a_token = n_bytes / sum(len(ids) - 1 for ids in texts)
    for name, path in paths.items():
        with torch.inference_mode():
            read[name] = path.read(texts)
        like, base = (read[other][:, path.chunk - 1 :: path.chunk] for other in (path.like, BASE))
        outcomes[name] = _outcome(path, read[name], like, base, bytes_a_token)
    return outcomes


def _outcome(path: Path, read: Tensor, like: Tensor, base: Tensor, bytes_a_token: float) -> Outcome:
    nats = -_mean(read)
    return Outcome(
        bits_per_byte=nats / log(2.0) / bytes_a_token,
        perplexity=exp(nats),
        n_tokens=read.numel(),
        against_cpu=exp(nats + _mean(base)) - 1.0,
        promise=path.promise,
        like=path.like,
        against_like=exp(nats + _mean(like)) - 1.0,
        bound=path.bound,
        n_different=int((read != like).sum()),
    )


def _mean(logprobs: Tensor) -> float:
    return float(logprobs.double().mean())


def broken(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Return what to say of every path that does not keep its promise; a path that gives no number is one."""
    return [f"{name}: {_complaint(outcome)}" for name, outcome in outcomes.items() if not outcome.kept]


def _complaint(outcome: Outcome) -> str:
    if outcome.promise == "same bits":
        return f"promises the bits of {outcome.like!r}; {outcome.n_different} of {outcome.n_tokens} tokens differ"
    change, bound = (f"{100 * value:.4f} %" for value in (outcome.against_like, outcome.bound))
    return f"changes the perplexity of {outcome.like!r} by {change}; at most {bound} is promised"


def render(outcomes: Mapping[str, Outcome]) -> str:
    """Return the outcomes as text."""
    rows = [
        (
            name,
            f"{one.bits_per_byte:.4f}",
            f"{one.perplexity:.4f}",
            f"{100 * one.against_cpu:+.4f} %",
            f"{_verdict(one)} {one.like}",
        )
        for name, one in outcomes.items()
    ]
    header = ("path", "bits/byte", "perplexity", "against cpu", "promise")
    return table("What the demo model makes of text", header, rows)


def _verdict(one: Outcome) -> str:
    if not one.kept:
        return "BROKEN:"
    if one.promise == "same bits":
        return "bit-identical to"
    return f"{one.promise}, within {100 * one.bound:.3g} % of"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("quality", __doc__)
    parser.add_argument("--tokens", type=int, default=256, help="of each module (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    texts, n_bytes = texts_of(options.tokens)
    outcomes = measure(PATHS, texts, n_bytes)
    fields: dict[str, Any] = {"modules": MODULES, "tokens": options.tokens, "n_bytes": n_bytes, "paths": outcomes}
    finish(options, result("quality", machine.describe(), virtual=False, **fields), render(outcomes))
    complaints = broken(outcomes)
    if complaints:
        raise SystemExit("\n".join(complaints))


if __name__ == "__main__":
    main()
