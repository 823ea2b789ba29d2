"""The tables of README and docs, each made from results: its header first, then its rows."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import geometric_mean, median
from typing import Any

from bench.report import Record, one, pick

Row = Sequence[str]
Make = Callable[..., Iterable[Row]]
TABLES: dict[str, tuple[tuple[str, ...], Make]] = {}
"""By name, the result files it comes from and what makes it."""

OURS, TIMES, DASH, US = "fiddler", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}", "\N{MICRO SIGN}s"
WHOLE = {"mixtral": ("Mixtral-8x7B", 32), "qwen3": ("Qwen3-30B-A3B", 48)}
"""What a synthetic checkpoint is a part of, and how many layers the whole has; by how its folder's name begins."""
ASKED = {"single": "one sequence", "concurrent": "{} sequences at once", "prefill": "a prompt of {}"}
PLANNERS = {"best_cut": "ours", "all_fetch": "every miss fetched", "all_cpu": "every miss on the CPU"}
QUANTISED = {"cpu": "bfloat16", "cpu, experts in int8": "int8", "cpu, experts in int4": "int4, groups of 32"}
FED = {
    "1 hidden as the experts get it": "**the rows as the experts get them**",
    "2 hidden / this norm's weight * the next one's": "with the next layer's norm instead of this one's",
    "4 residual + experts' output through the next norm": "the residual and the experts' output, a layer done",
    "1, two layers ahead": "two layers ahead",
    "the token before": "the token before, same layer",
    "transitions, of other domains": "transition counts, fit on other domains",
}
TRACES = ("demo, tuning", "demo, held out", "made up, tuning", "made up, held out")
PEERS = ("freetoken", "hybrimoe", "hybrimoe-no-prefetch", "ktransformers", "fiddler-2024", "mixtral-offloading")
PEERS += ("llama.cpp", "all-fetch", "all-cpu")


def table(name: str, *files: str) -> Callable[[Make], Make]:
    """Name what makes a table, and the results it is made from."""

    def keep(make: Make) -> Make:
        TABLES[name] = files, make
        return make

    return keep


@table("speeds", "latency-qwen3-2core-epyc", "latency-mixtral-2core-epyc", "latency-demo-2core-epyc")
def speeds(*reports: Record) -> Iterator[Row]:
    yield "model", "what", "Fiddler, tokens/s", "of the limit", "llama.cpp", "transformers' fastest experts"
    names = ("scenario", "n_sequences", "n_input", "n_output", "n_beams")
    for report in reports:
        for ours in (row for row in pick(report.systems, system=OURS) if row.scenario in ASKED):
            found = pick(report.systems, unavailable=None, **{name: ours[name] for name in names})
            llama = pick(found, system="llama.cpp")
            best = max((row for row in found if row.system.endswith(("mm", "eager"))), key=_speed)
            asked = ASKED[ours.scenario].format(ours.n_input if ours.scenario == "prefill" else ours.n_sequences)
            cells = (_beside(llama[0]) if llama else DASH, f"{_beside(best)} `{best.system}`")
            yield _model(report), asked, _three(_speed(ours)), _percent(ours.of_limit), *cells


@table("steps-amx", "latency-qwen3-2core-amx", "latency-mixtral-2core-amx")
@table("steps-epyc", "latency-qwen3-2core-epyc", "latency-mixtral-2core-epyc")
def steps(*reports: Record) -> Iterator[Row]:
    yield "ms per step (GB/s, share of the ceiling)", *map(_model, reports)
    for parts in zip(*(pick(report.parts, n_sequences=1) for report in reports), strict=True):
        yield parts[0].part, *(f"{p.step_ms:.1f} ({p.gbs:.1f}, {_percent(p.of_ceiling)})" for p in parts)


@table("chunks", "prefill-qwen3-2core-epyc")
def chunks(report: Record) -> Iterator[Row]:
    yield "prompt", "chunk", "first token, s", "tokens/s", "experts read, GB", "of the best matmul"
    for c in report.cells:
        speed, read = f"{c.tokens_per_s:.0f}", f"{c.expert_bytes / 1e9:.1f}"
        yield str(c.n_input), str(c.chunk_tokens), f"{c.first_token_s.median:.2f}", speed, read, _percent(c.of_gemm)


@table("packed", "packed-2core-epyc")
def packed(report: Record) -> Iterator[Row]:
    yield "model", "format", "1 row: GB/s (of the ceiling)", "time of bf16's", "4 rows", "16 rows", "32 rows"
    cells = {(c.model, c.format, c.n_rows): c for c in report.experts}
    for model, name in dict.fromkeys((c.model, c.format) for c in report.experts):
        one, *more = (cells[model, name, n] for n in (1, 4, 16, 32))
        speed = f"{one.gbs.high:.1f} ({_percent(one.of_ceiling)})"
        yield model, name, speed, *(f"{c.of_bf16:.2f}" for c in (one, *more))


@table("overhead", "overhead-2core-epyc", "overhead-qwen3-2core-epyc")
def overhead(demo: Record, qwen3: Record) -> Iterator[Row]:
    yield "what deciding costs", "median", "goal"
    yield "a layer through runner, scheduler and three lanes", f"{demo.layer_us.median:.0f} {US}", f"250 {US}"
    yield "the same on a GPU that does nothing", f"{demo.gpu_layer_us.median:.0f} {US}", f"350 {US}"
    yield "the same, beyond host experts of a millisecond", f"{demo.gpu_layer_beside_us.median:.0f} {US}", ""
    yield "a bare hop to two lanes and back", f"{demo.hop_us.median:.0f} {US}", ""
    yield "on a CPU alone, of a step of the demo model", _percent(demo.cost, 1), "3 %"
    yield "on a CPU alone, of a step of Qwen3-30B-A3B's shape, 4 layers", _percent(qwen3.cost, 1), "3 %"


@table("quantised", "quality-2core-epyc")
def quantised(report: Record) -> Iterator[Row]:
    yield "experts of the demo model", "bits per byte", "more than bfloat16", "perplexity"
    base = report.paths["cpu"]
    for name, said in QUANTISED.items():
        path = report.paths[name]
        more = _percent(path.bits_per_byte / base.bits_per_byte - 1.0, 2)
        yield said, f"{path.bits_per_byte:.4f}", more if path is not base else DASH, f"{path.perplexity:.2f}"


@table("plan", "plan-2core-epyc")
def plan(report: Record) -> Iterator[Row]:
    yield "planner", "mean", "p99", "worst"
    for name, said in PLANNERS.items():
        r = one(report.ratios, planner=name)
        yield said, f"{r.mean:.4f}", f"{r.p99:.3f}", f"{r.worst:.2f}"


@table("waves", "waves-virtual")
def waves(report: Record) -> Iterator[Row]:
    yield "model", "machine", "sequences", "one wave, tok/s", "chosen, tok/s", "gain"
    gains = [c.auto_tokens_per_s / c.one_tokens_per_s for c in report.cells]
    for c, gain in zip(report.cells, gains, strict=True):
        if gain > 1.0005:  # what rounds to more than the same
            figures = (f"{c.one_tokens_per_s:.1f}", f"{c.auto_tokens_per_s:.1f}", f"{gain:.2f}{TIMES}")
            yield c.model, c.machine, str(c.n_sequences), *figures
    yield f"*the least of all {len(gains)} cells*", "", "", "", "", f"{min(gains):.2f}{TIMES}"


@table("formats", "formats-virtual")
def formats(report: Record) -> Iterator[Row]:
    sizes, busy = ("in slots", "GB in slots"), tuple(f"{lane} busy" for lane in ("GPU", "link", "CPU"))
    yield "sequences", "experts", *sizes, "tokens/s", "of bf16", *busy
    for c in report.cells:
        plain = one(report.cells, format="bf16", n_sequences=c.n_sequences, asked_share=c.asked_share)
        held = _percent(c.share) if c.asked_share is not None else f"all that fit: {_percent(c.share)}"
        speed = f"{c.tokens_per_s:.1f}", f"{c.tokens_per_s / plain.tokens_per_s:.2f}{TIMES}"
        shares = (_percent(c[f"{lane}_busy"]) for lane in ("gpu", "link", "cpu"))
        yield str(c.n_sequences), c.format, held, f"{c.slot_bytes / 1e9:.1f}", *speed, *shares


@table("reads", "cache")
def reads(report: Record) -> Iterator[Row]:
    yield "reads beside Belady's", *TRACES[:2], "looser", "fitted, held out"
    for policy in (s.policy for s in sorted(pick(report.summary, traces="all"), key=lambda s: s.mean)):
        found = [one(report.summary, policy=policy, traces=name) for name in TRACES]
        yield f"`{policy}`", *(f"{s.mean:.2f} / {s.median:.2f}" for s in found)


@table("systems", "policies-virtual")
def systems(report: Record) -> Iterator[Row]:
    last = ("over `fiddler-2024`", "over the best", "of bound", "layer by layer")
    yield "routing, model, sequences", "**ours**", *(f"`{name}`" for name in PEERS), *last
    for v in pick(report.verdicts, machine="rtx4090-desktop", resident=0.25):
        cells = {cell.system: cell for cell in pick(report.cells, **v.place)}
        rates = (f"{cells[name].tokens_per_s:#.3g}" for name in (OURS, *PEERS))
        shares = (f"{share:.2f}" for share in (v.over_original, v.over_best, v.of_bound, v.of_chain))
        yield f"{v.place.routing}, {v.place.model}, {v.place.n_sequences}", *rates, *shares


@table("verdicts", "policies-virtual")
def verdicts(report: Record) -> Iterator[Row]:
    best = ("over the best: least, mean", "the best other")
    yield "ours, in", "places", *best, "over `fiddler-2024`", "of the bound", "0.80 of it or more"
    groups: dict[str, dict[str, Any]] = {"all places": {}}
    groups |= {f"{routing} routing": {"routing": routing} for routing in ("fitted", "looser")}
    groups |= {"one sequence": {"n_sequences": 1}, "four sequences": {"n_sequences": 4}}
    for name, fields in groups.items():
        found = pick(report.verdicts, **fields)
        peers = ", ".join(f"`{peer}` in {n}" for peer, n in Counter(v.best_peer for v in found).most_common())
        spans = (_span(v.over_original for v in found), _span(v.of_bound for v in found))
        n_reached = sum(v.of_bound >= 0.8 for v in found)
        over = f"{min(v.over_best for v in found):.2f}, {geometric_mean(v.over_best for v in found):.2f}"
        yield name, str(len(found)), over, peers, *spans, f"in {n_reached}"


@table("lookahead", "lookahead-2core-epyc")
def lookahead(report: Record) -> Iterator[Row]:
    yield "fed", "mean", "layers 1 … 5", "among twice as many guesses"
    for name, said in FED.items():
        found, twice = report.recall.get(name) or report.recall[f"{name}, x1"], report.recall.get(f"{name}, x2")
        layers = [f"{found[f'layer {i}']:.2f}" if f"layer {i}" in found else DASH for i in range(1, 6)]
        yield said, f"{found.mean:.3f}", ", ".join(layers), DASH if twice is None else f"{twice.mean:.3f}"
    yield "chance", f"{report.recall.chance:.3f}", "", f"{2 * report.recall.chance:.3f}"


@table("world", "world-virtual")
def world(report: Record) -> Iterator[Row]:
    yield "", "system", "published", "predicted", "error", "data sheet", "assumed", "implied"
    for i, row in enumerate(report.cells):
        title = "" if i and report.cells[i - 1].cell.table == row.cell.table else row.cell.table
        error = _percent(row.error, 0, "+")
        numbers = [row.cell.published, row.predicted, row.of_data_sheet, row.cpu_share, row.implied_cpu_share]
        published, predicted, *others = ("" if number is None else f"{number:.2f}" for number in numbers)
        yield title, row.cell.system, published, predicted, error, *others
    errors = {"all": report.cells, "without llama.cpp": [c for c in report.cells if c.cell.system != "llama.cpp"]}
    for name, cells in errors.items():
        yield f"*median error, {name}*", "", "", "", _percent(median(abs(c.error) for c in cells)), "", "", ""


def _speed(row: Record) -> float:
    """Return tokens a second, of the prompt where there is nothing else; 0 where it was not timed."""
    if row.scenario == "prefill":
        return row.n_input / row.first_token_s.median if row.first_token_s else 0.0
    return float(row.decode_tokens_per_s.median)


def _beside(row: Record) -> str:
    return f"{_three(_speed(row))} ({row.fiddler_is_times:.2f}{TIMES})"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _model(report: Record) -> str:
    name = report.settings.model
    whole, n_layers = WHOLE.get(name.partition("-")[0], ("", 0))
    return f"{whole}, {report.model.n_layers} of {n_layers} layers" if whole else f"the {name} model"


def _percent(share: float, digits: int = 0, sign: str = "") -> str:
    return f"{100.0 * share:{sign}.{digits}f} %".replace("-", "\N{MINUS SIGN}")


def _span(values: Iterable[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]:.2f} to {ordered[-1]:.2f}"
