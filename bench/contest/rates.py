"""What systems did with one workload: rates, and the share they reach of what the machine allows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench.report import Spread
from bench.workload import Run, Step, Workload

OURS = "fiddler"


@dataclass(slots=True)
class Results:
    """What was seen of one workload."""

    scenario: str
    workload: Workload
    runs: dict[str, list[Run]] = field(default_factory=dict)
    """By system; the i-th runs of all systems belong to one turn."""
    unavailable: dict[str, str] = field(default_factory=dict)
    """Why a system did not run, by system."""
    steps: list[Step] = field(default_factory=list)
    """Fiddler's decoding steps, taken apart; empty where they cannot be."""
    alone_s: list[float] = field(default_factory=list)
    """Seconds of each step's expert kernels, run again with nothing around them."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The least that any system must do for a workload, and what this machine can do a second."""

    step_bytes: float
    """Weights read in a step of decoding, each once."""
    prompt_flop: float
    """Operations on weights in a prompt, all its rows."""
    gbs: float
    flop_per_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """One system with one workload; a figure it has none of is `None`."""

    system: str
    scenario: str
    n_sequences: int
    n_input: int
    n_output: int
    n_beams: int
    unavailable: str | None = None
    first_token_s: Spread | None = None
    decode_tokens_per_s: Spread | None = None
    """Tokens of all sequences after the first of each, over the time after it."""
    tokens_per_s: Spread | None = None
    """All tokens, over the whole time."""
    fiddler_is_times: float | None = None
    """How many times as fast Fiddler was, by the scenario's figure: the median over turns."""
    gbs: float | None = None
    """Weights read a second while decoding."""
    prompt_flop_per_s: float | None = None
    of_limit: float | None = None
    """Of what the machine reads a second, or of the operations it does, what these are."""


def rows(results: Results, limit: Limit | None) -> list[Row]:
    """Summarise every system; `limit` is `None` where nothing was measured that could be one."""
    workload = results.workload
    about: dict[str, Any] = {
        "scenario": results.scenario,
        "n_sequences": workload.n_sequences,
        "n_input": workload.n_input,
        "n_output": workload.n_output,
        "n_beams": workload.n_beams,
    }
    ran = [Row(system, **about, **_figures(results, system, limit)) for system in results.runs]
    return ran + [Row(system, **about, unavailable=why) for system, why in results.unavailable.items()]


def _figures(results: Results, system: str, limit: Limit | None) -> dict[str, Any]:
    runs, workload = results.runs[system], results.workload
    figures: dict[str, Any] = {
        "first_token_s": _spread(run.first_token_s for run in runs),
        "decode_tokens_per_s": _spread(run.decode_tokens_per_s for run in runs),
        "tokens_per_s": _spread(run.tokens_per_s for run in runs),
    }
    pairs = [
        (speed(ours, results.scenario), speed(theirs, results.scenario))
        for ours, theirs in zip(results.runs[OURS], runs, strict=False)
    ]
    ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    figures["fiddler_is_times"] = median(ratios) if ratios else None
    return figures | (_of_limit(figures, workload, results.scenario, limit) if limit else {})


def _of_limit(figures: Mapping[str, Any], workload: Workload, scenario: str, limit: Limit) -> dict[str, Any]:
    first, decode = figures["first_token_s"], figures["decode_tokens_per_s"]
    if scenario == "prefill" and first is not None:
        rate = limit.prompt_flop / first.median
        return {"prompt_flop_per_s": rate, "of_limit": rate / limit.flop_per_s}
    if scenario in ("single", "concurrent") and decode is not None:
        gbs = decode.median / workload.n_sequences * limit.step_bytes / 1e9
        return {"gbs": gbs, "of_limit": gbs / limit.gbs}
    return {}


def speed(run: Run, scenario: str) -> float | None:
    """Return the figure a scenario is about, higher for faster; `None` where the run has none."""
    if scenario == "prefill":
        return None if run.first_token_s is None else 1.0 / run.first_token_s
    return run.tokens_per_s if scenario == "beam" else run.decode_tokens_per_s


def _spread(values: Any) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread.of(known) if known else None
