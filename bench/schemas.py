"""What results hold: the fields that all of them have, and by bench those that its readers need."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.gpu.schema import GPU

NUMBER = (int, float)


@dataclass(frozen=True, slots=True)
class Each:
    """An object with any keys; of its values."""

    value: Any


Schema = Any
"""A type or a tuple of them; `Each`; a list of one, of its members; or a dict of the keys that are read, others are
ignored. An empty list or object holds nothing that could be read: it is wrong. `"key?"` may be absent, null or
empty."""

SPREAD = {"median": NUMBER, "low": NUMBER, "high": NUMBER}
COMMON = {
    "bench": str,
    "machine": {
        "cpu": str,
        "n_cores": int,
        "isa": list,
        "ram_gib": NUMBER,
        "torch": str,
        "transformers": str,
        "fiddler": str,
        "threads": int,
        "commit": str,
        "date": str,
    },
    "virtual": bool,
}
_PLACE = {"routing": str, "model": str, "machine": str, "resident": NUMBER, "n_sequences": int}
_RAN = {
    "system": str,
    "scenario": str,
    "n_sequences": int,
    "n_input": int,
    "n_output": int,
    "n_beams": int,
    "unavailable?": str,
    "first_token_s?": SPREAD,
    "decode_tokens_per_s?": SPREAD,
    "tokens_per_s?": SPREAD,
    "fiddler_is_times?": NUMBER,
    "gbs?": NUMBER,
    "prompt_flop_per_s?": NUMBER,
    "of_limit?": NUMBER,
}
_PART = {
    "part": str,
    "step_ms": NUMBER,
    "gbs": NUMBER,
    "kernel_gbs": NUMBER,
    "of_kernel": NUMBER,
    "of_ceiling": NUMBER,
}
_VERDICT = {"place": _PLACE, "over_original": NUMBER, "best_peer": str, "over_best": NUMBER, "of_bound": NUMBER}
_PATH = {
    "bits_per_byte": NUMBER,
    "perplexity": NUMBER,
    "n_tokens": int,
    "against_cpu": NUMBER,
    "promise": str,
    "like": str,
    "against_like": NUMBER,
    "bound": NUMBER,
    "n_different": int,
}
_CHUNKED = {
    "n_input": int,
    "chunk_tokens": int,
    "first_token_s": SPREAD,
    "tokens_per_s": NUMBER,
    "expert_bytes": int,
    "gbs": NUMBER,
    "of_ceiling": NUMBER,
    "tflop_per_s": NUMBER,
    "of_gemm": NUMBER,
}
_WAVES = {
    "model": str,
    "machine": str,
    "n_sequences": int,
    "one_tokens_per_s": NUMBER,
    "auto_tokens_per_s": NUMBER,
    "of_bound": NUMBER,
}
_PUBLISHED = {"table": str, "system": str, "machine": str, "model": str, "published": NUMBER, "source": str}
_PREDICTED = {"predicted": NUMBER, "error": NUMBER, "of_data_sheet": NUMBER, "cpu_share?": NUMBER}

SCHEMAS: Mapping[str, dict[str, Schema]] = {
    "gpu": GPU,
    "cache": {
        "summary": [{"policy": str, "traces": str, "mean": NUMBER, "median": NUMBER, "worst": NUMBER}],
        "cells": [
            {"trace": str, "policy": str, "resident": NUMBER, "n_hits": int, "n_misses": int, "ratio": NUMBER}
        ],
    },
    "kernels": {
        "read_ceiling_gbs": NUMBER,
        "ways_to_read": Each(SPREAD),
        "gemm_flop_per_s?": SPREAD,
        "kernels": [{"kernel": str, "out": int, "columns": int, "n_rows": int, "gbs": SPREAD}],
        "experts": [{"hidden": int, "intermediate": int, "n_rows": int, "gbs": SPREAD}],
    },
    "latency": {
        "settings": {"model": str, "repeats": int},
        "model?": {"n_layers": int, "dtype": str, "expert_bytes": int},
        "read_ceiling_gbs?": NUMBER,
        "gemm_flop_per_s?": SPREAD,
        "systems": [_RAN],
        "overhead?": [{"n_sequences": int, "per_layer_us": NUMBER, "routing_us": NUMBER, "per_step_us": NUMBER}],
        "parts?": [_PART],
    },
    "lookahead": {"n_tokens": Each(int), "recall": dict, "demo_us": Each(Each(NUMBER)), "architectures": Each(str)},
    "overhead": {
        "layer_us": SPREAD,
        "hop_us": SPREAD,
        "model": str,
        "step_us": {"scheduler": SPREAD, "plain call": SPREAD},
        "cost": NUMBER,
    },
    "plan": {
        "settings": {"layers": int, "repeats": int, "seeds": int},
        "times": [{"n_loads": int, "median_us": NUMBER, "p90_us": NUMBER, "worst_us": NUMBER}],
        "ratios": [{"planner": str, "mean": NUMBER, "p99": NUMBER, "worst": NUMBER}],
    },
    "policies": {
        "work": {"prompt": int, "new": int},
        "verdicts": [_VERDICT],
        "cells": [{"place": _PLACE, "system": str, "tokens_per_s": NUMBER, "of_bound": NUMBER, "hits": NUMBER}],
    },
    "prefill": {
        "settings": {"model": str, "chunks": [int], "repeats": int},
        "gemm_flop_per_s": SPREAD,
        "read_ceiling_gbs": NUMBER,
        "cells": [_CHUNKED],
    },
    "quality": {"modules": [str], "tokens": int, "n_bytes": int, "paths": Each(_PATH)},
    "synthetic": {
        "settings": {"model": str, "device": str, "routing": str, "n_sequences": int, "prompt": int, "new": int},
        "model": {"n_layers": int, "dtype": str, "dense_bytes": int, "expert_bytes": int},
        "fill_s": NUMBER,
        "fill_gbs": NUMBER,
        "n_slots": int,
        "first_token_s": SPREAD,
        "tokens_per_s": SPREAD,
        "hit_share": SPREAD,
    },
    "waves": {"setting": {"prompt": int, "new": int, "resident": NUMBER}, "cells": [_WAVES]},
    "world": {
        "routing": str,
        "order_right": Each(bool),
        "cells": [{"cell": _PUBLISHED, **_PREDICTED, "implied_cpu_share?": NUMBER, "figures": Each(NUMBER)}],
    },
}


def problems(report: Any) -> list[str]:
    """Return what is wrong with a report, read from JSON; a bench without a schema is."""
    found = list(_wrong(report, COMMON, "report"))
    if found:
        return found
    if report["bench"] not in SCHEMAS:
        return [f"no schema of bench {report['bench']!r}"]
    return list(_wrong(report, SCHEMAS[report["bench"]], report["bench"]))


def _wrong(value: Any, schema: Schema, where: str) -> Iterator[str]:
    match schema:
        case Each(inner):
            yield from _wrong_container(value, dict, where)
            for key in value if isinstance(value, dict) else ():
                yield from _wrong(value[key], inner, f"{where}[{key!r}]")
        case [inner]:
            yield from _wrong_container(value, list, where)
            for i, member in enumerate(value if isinstance(value, list) else ()):
                yield from _wrong(member, inner, f"{where}[{i}]")
        case dict():
            yield from _wrong_container(value, dict, where)
            for key in schema if isinstance(value, dict) else ():
                yield from _wrong_key(value, key, schema[key], where)
        case _:
            types = schema if isinstance(schema, tuple) else (schema,)
            if type(value) not in types:
                yield f"{where} is {value!r}, not of {' or '.join(t.__name__ for t in types)}"


def _wrong_key(value: Mapping[str, Any], key: str, schema: Schema, where: str) -> Iterator[str]:
    name = key.removesuffix("?")
    if name == key and name not in value:
        yield f"{where} lacks {name!r}"
    elif name == key or value.get(name):
        yield from _wrong(value[name], schema, f"{where}.{name}")


def _wrong_container(value: Any, kind: type, where: str) -> Iterator[str]:
    if not isinstance(value, kind) or not value:
        yield f"{where} is {value!r}, not a {kind.__name__} with something in it"
