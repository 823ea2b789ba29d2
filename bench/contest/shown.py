"""How a latency run is shown: a table for each workload, and sentences for what a table cannot say."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import inf
from typing import Any

from bench.contest.rates import OURS, Row
from bench.peers.known import PEERS
from bench.report import Spread, Table, listing, table

CACHED_BYTES = 32 << 20
"""A model with fewer bytes of experts is not read from memory on any server's processor."""
_KEY = ("scenario", "n_sequences", "n_input", "n_output", "n_beams")


def render(report: Mapping[str, Any]) -> str:
    """Return a report as text: what ran, a table for each workload, on the CPU where a step's time goes."""
    lines = [_about(report), *_left_out(report["settings"]["compared"])]
    for _, group in groupby(report["systems"], key=lambda row: [getattr(row, name) for name in _KEY]):
        found = list(group)
        lines.append(table(*titled(found)))
        lines += [f"{row.system} did not run: {row.unavailable}" for row in found if row.unavailable is not None]
    lines += _batching(report["systems"])
    if report.get("parts"):
        lines.append(listing("Decoding, part by part, beside its limits", report["parts"]))
        lines.append(listing("Time beside the kernels (goal: at most 150 us a layer)", report["overhead"]))
    return "\n".join(lines)


def _left_out(compared: Sequence[str]) -> list[str]:
    left = [name for name in PEERS if name not in compared]
    return [f"not asked for: {', '.join(left)}"] if left else []


def _about(report: Mapping[str, Any]) -> str:
    settings, sizes = report["settings"], report.get("model")
    name = f"{settings['model']}, {settings['repeats']} repeats; medians, in brackets the least and the most"
    if sizes is None:
        clock = "the machine's own, VIRTUAL, seconds" if report["virtual"] else "seconds"
        return f"{name}\non {settings['device']}, in {clock}"
    cached = sizes["expert_bytes"] < CACHED_BYTES
    return (
        f"{name}\n{sizes['n_layers']} MoE layers, experts {sizes['expert_bytes'] / 1e9:.2f} GB, read per token "
        f"outside experts {(sizes['dense_bytes'] + sizes['head_bytes']) / 1e6:.0f} MB\n"
        f"the limit, measured in this run: weights read at {report['read_ceiling_gbs']:.1f} GB/s, "
        f"{report['gemm_flop_per_s'].high / 1e12:.2f} TFLOP/s in bf16"
        + "\nthis model lies in the processor's cache: its speed is that of calling small operations"
        * cached
    )


def _batching(found: Sequence[Row]) -> list[str]:
    """Say how much more concurrent requests make than one of the same lengths."""
    speeds = {
        (row.scenario, row.n_sequences, row.n_input, row.n_output): row.decode_tokens_per_s.median
        for row in found
        if row.system == OURS and row.decode_tokens_per_s is not None
    }
    return [
        f"\n{n} concurrent requests make {speed / alone:.2f}x the tokens of one"
        for (scenario, n, *lengths), speed in speeds.items()
        if scenario == "concurrent" and (alone := speeds.get(("single", 1, *lengths)))
    ]


def titled(results: Sequence[Row]) -> Table:
    """Return the table of one workload's rows, the fastest first, as a newcomer reads them."""
    first = results[0]
    ran = sorted((row for row in results if row.unavailable is None), key=_order)
    if first.scenario == "prefill":
        header = ("", "seconds to the first token", "prompt tokens/s", "fiddler is", "of the limit")
        cells = [
            (row.system, _shown(row.first_token_s, ".3f"), _per_s(row), _times(row), _share(row)) for row in ran
        ]
    elif first.scenario == "beam":
        header = ("", "tokens/s, prompt and all", "fiddler is")
        cells = [(row.system, _shown(row.tokens_per_s, ".1f"), _times(row)) for row in ran]
    else:
        header = ("", "tokens/s", "first token after s", "fiddler is", "weights read", "of the limit")
        cells = [
            (
                row.system,
                _shown(row.decode_tokens_per_s, ".1f"),
                _shown(row.first_token_s, ".3f"),
                _times(row),
                "-" if row.gbs is None else f"{row.gbs:.1f} GB/s",
                _share(row),
            )
            for row in ran
        ]
    return _title(first), header, cells


def _order(row: Row) -> float:
    if row.scenario == "prefill":
        return row.first_token_s.median if row.first_token_s else inf
    speed = row.tokens_per_s if row.scenario == "beam" else row.decode_tokens_per_s
    return -speed.median if speed else inf


def _title(row: Row) -> str:
    lengths = f"{row.n_input} tokens in, {row.n_output} out"
    match row.scenario:
        case "prefill":
            return f"A prompt of {row.n_input} tokens"
        case "beam":
            return f"Beam search, {row.n_beams} beams: {lengths}"
        case "concurrent":
            return f"{row.n_sequences} sequences at once, all together: {lengths} each"
        case _:
            return f"One sequence: {lengths}"


def _shown(value: Spread | None, spec: str) -> str:
    return "-" if value is None else f"{value:{spec}}"


def _per_s(row: Row) -> str:
    return "-" if row.first_token_s is None else f"{row.n_input / row.first_token_s.median:.0f}"


def _times(row: Row) -> str:
    if row.system == OURS or row.fiddler_is_times is None:
        return ""
    return f"{row.fiddler_is_times:.2f}x as fast"


def _share(row: Row) -> str:
    return "-" if row.of_limit is None else f"{row.of_limit:.0%}"
