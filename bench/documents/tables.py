"""Tables of documents that show measurements, each a function of results."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.values import Record, one, percent, pick

OURS = "fiddler"
TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
TRUE_SHAPES = {
    "mixtral": ("Mixtral-8x7B", 32),
    "mixtral-8x7b": ("Mixtral-8x7B", 32),
    "qwen3": ("Qwen3-30B-A3B", 48),
    "qwen3-30b-a3b": ("Qwen3-30B-A3B", 48),
}
"""What a synthetic checkpoint is a part of, and how many layers the whole has; by its folder's name."""
TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")
ASKED = {
    "single": "one sequence",
    "concurrent": "{0.n_sequences} sequences at once",
    "prefill": "a prompt of {0.n_input}",
}
"""The scenarios that the table of speeds shows, and what it calls them."""
GOALS = {
    "single": ("1.0 \N{MULTIPLICATION SIGN} and 1.15 \N{MULTIPLICATION SIGN}", "1.5 \N{MULTIPLICATION SIGN}"),
    "concurrent": ("", ""),
    "prefill": ("3 \N{MULTIPLICATION SIGN}", ""),
}
"""How many times as fast Fiddler should be as llama.cpp (Qwen's shape, Mixtral's) and as transformers."""
PLANNERS = {"best_cut": "ours", "all_fetch": "every miss fetched", "all_cpu": "every miss on the CPU"}
FED = {
    "1 hidden as the experts get it": "**the rows as the experts get them**",
    "2 hidden / this norm's weight * the next one's": "with the next layer's norm instead of this one's",
    "4 residual + experts' output through the next norm": "the residual and the experts' output, a layer done",
    "1, two layers ahead": "two layers ahead",
    "the token before": "the token before, same layer",
    "transitions, of other domains": "transition counts, fit on other domains",
}
"""What a look-ahead may go by: its name in the file, and what documents call it."""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def how_fast(*reports: Record) -> str:
    """Return speeds beside llama.cpp and transformers' fastest experts, of reports of `bench.latency`."""
    header = ("model", "what", "Fiddler, tokens/s", "of the limit", "llama.cpp", "transformers' fastest experts")
    asked = [(report, ours) for report in reports for ours in pick(report.systems, system=OURS)]
    return markdown(header, [_speeds(report, ours) for report, ours in asked if ours.scenario in ASKED])


def _speeds(report: Record, ours: Record) -> Sequence[str]:
    same = {name: ours[name] for name in ("scenario", "n_sequences", "n_input", "n_output", "n_beams")}
    found = pick(report.systems, unavailable=None, **same)
    fastest = _fastest(found)
    llama = next((row for row in found if row.system == "llama.cpp"), None)
    return (
        _model(report),
        ASKED[ours.scenario].format(ours),
        _number(_speed(ours)),
        f"{ours.of_limit:.0%}".replace("%", " %"),
        _beside(llama),
        _beside(fastest) + (f" `{fastest.system}`" if fastest is not None else ""),
    )


def _fastest(rows: Iterable[Record]) -> Record | None:
    """Return transformers' fastest experts of those that ran one workload."""
    timed = [row for row in rows if row.system in TRANSFORMERS and _speed(row) is not None]
    return max(timed, key=_speed, default=None)


def _speed(row: Record) -> float | None:
    """Return tokens a second, of the prompt where there is nothing else; `None` where it was not timed."""
    if row.scenario == "prefill":
        return row.n_input / row.first_token_s.median if row.first_token_s is not None else None
    return None if row.decode_tokens_per_s is None else row.decode_tokens_per_s.median


def _beside(row: Record | None) -> str:
    return DASH if row is None else f"{_number(_speed(row))} ({row.fiddler_is_times:.2f}{TIMES})"


def _number(value: float | None) -> str:
    """Return a speed to three digits; all before the point."""
    assert value is not None
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def against(*reports: Record) -> str:
    """Return how many times as fast Fiddler is as the others in each scenario, beside the goals."""
    rows = []
    for scenario, goals in GOALS.items():
        asked = ASKED[scenario].format(ran(reports[0], OURS, scenario))
        llama = [ran(report, "llama.cpp", scenario) for report in reports]
        best = [_fastest(pick(report.systems, scenario=scenario, unavailable=None)) for report in reports]
        for name, found, goal in (("llama.cpp", llama, goals[0]), ("transformers' fastest", best, goals[1])):
            rows.append((f"{name}, {asked}", goal, *(f"{row.fiddler_is_times:.2f}{TIMES}" for row in found)))
    return markdown(("", "goal, on AMX", *map(_model, reports)), rows)


def chunks(report: Record) -> str:
    """Return times to the first token by prompt length and chunk size."""
    rows = [
        (
            str(cell.n_input),
            str(cell.chunk_tokens),
            f"{cell.first_token_s.median:.2f}",
            f"{cell.tokens_per_s:.0f}",
            f"{cell.expert_bytes / 1e9:.1f}",
            percent(cell.of_gemm),
        )
        for cell in report.cells
    ]
    header = ("prompt", "chunk", "first token, s", "tokens/s", "experts read, GB", "of the best matmul")
    return markdown(header, rows)


def ran(report: Record, system: str, scenario: str) -> Record:
    """Return a system's row in a scenario that was run once."""
    return one(report.systems, system=system, scenario=scenario)


def fastest_peer(report: Record, n_sequences: int) -> Record:
    """Return the fastest other system of a latency report."""
    asked = "single" if n_sequences == 1 else "concurrent"
    ran = pick(report.systems, scenario=asked, n_sequences=n_sequences, unavailable=None)
    return max((s for s in ran if s.system != OURS), key=lambda s: s.decode_tokens_per_s.median)


def _model(report: Record) -> str:
    name = report.settings.model
    if name not in TRUE_SHAPES:
        return f"the {name} model"
    whole, n_layers = TRUE_SHAPES[name]
    return f"{whole}, {report.model.n_layers} of {n_layers} layers"


def part(report: Record, name: str, n_sequences: int = 1) -> Record:
    """Return a part of a step of a latency report."""
    return one(report.parts, part=name, n_sequences=n_sequences)


def rate(report: Record, n_sequences: int) -> float:
    """Return Fiddler's decoding tokens/s in a latency report, all sequences together."""
    asked = "single" if n_sequences == 1 else "concurrent"
    found: float = one(
        report.systems, system=OURS, scenario=asked, n_sequences=n_sequences
    ).decode_tokens_per_s.median
    return found


def step_times(*reports: Record) -> str:
    """Return where the milliseconds of a step with one sequence go."""
    parts = [pick(report.parts, n_sequences=1) for report in reports]
    rows = [
        (same[0].part, *(f"{p.step_ms:.1f} ({p.gbs:.1f} GB/s)" for p in same)) for same in zip(*parts, strict=True)
    ]
    return markdown(("ms per step", *map(_model, reports)), rows)


def planners(report: Record) -> str:
    """Return makespans as multiples of the best, by planner."""
    found = [(said, one(report.ratios, planner=name)) for name, said in PLANNERS.items()]
    rows = [(said, f"{r.mean:.4f}", f"{r.p99:.3f}", f"{r.worst:.2f}") for said, r in found]
    return markdown(("planner", "mean", "p99", "worst"), rows)


def lookaheads(report: Record) -> str:
    """Return what share of the next layer's experts was named, by what the look-ahead goes by."""
    rows = [_recall(report.recall, name, said) for name, said in FED.items()]
    chance = report.recall.chance
    header = ("fed", "mean", "layers 1 … 5", "among twice as many guesses")
    return markdown(header, [*rows, ("chance", f"{chance:.3f}", "", f"{2 * chance:.3f}")])


def _recall(recall: Record, name: str, said: str) -> Sequence[str]:
    once = recall[name] if name in recall else recall[f"{name}, x1"]
    twice = f"{recall[f'{name}, x2'].mean:.3f}" if f"{name}, x2" in recall else DASH
    layers = [f"{once[f'layer {i}']:.2f}" if f"layer {i}" in once else DASH for i in range(1, 6)]
    return (said, f"{once.mean:.3f}", ", ".join(layers), twice)


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (how_fast, against, chunks, ran, fastest_peer, part, rate, step_times, planners, lookaheads)
}
