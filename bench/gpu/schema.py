"""What a result of `bench.gpu` holds, part by part, in the terms of `bench.schemas`.

A part that failed, or was cut off, has what it had found by then: all of its own keys may be absent.
"""

from collections.abc import Mapping
from typing import Any

NUMBER = (int, float)
SPREAD = {"median": NUMBER, "low": NUMBER, "high": NUMBER}
_PLACE = {"model": str, "budget_gib": NUMBER, "system": str}
_DECODED = {
    **_PLACE,
    "n_sequences": int,
    "n_readings": int,
    "tokens_per_s": SPREAD,
    "hits?": SPREAD,
    "read_bytes_per_token": {"cpu": SPREAD, "gpu": SPREAD, "link": SPREAD},
    "of_bound?": SPREAD,
    "of_kernel_bound?": SPREAD,
}
_AGREED = {
    "architecture": str,
    "way": str,
    "n_tokens": int,
    "n_equal": int,
    "first_difference?": {"prompt": int, "token": int, "margin": NUMBER},
    "largest_margin": NUMBER,
    "tolerance": NUMBER,
    "agrees": bool,
}
_RATES = {"cpu": NUMBER, "link": NUMBER, "gpu": NUMBER}
_HOST_EXPERTS = {
    "shape": str,
    "hidden": int,
    "intermediate": int,
    "n_rows": int,
    "gbs": SPREAD,
    "of_ceiling?": NUMBER,
}
_SLOT_EXPERTS = {
    "shape": str,
    "n_rows": int,
    "path": str,
    "gbs?": SPREAD,
    "from_rest_s?": SPREAD,
    "unavailable?": str,
}

PARTS: Mapping[str, dict[str, Any]] = {
    "checks": {
        "tests?": {"paths": list, "says": str, "tests?": int, "failures?": int, "errors?": int, "skipped?": int},
        "agreement?": {"n_prompts": int, "rows": [_AGREED]},
    },
    "facts": {
        "rates?": {"ceilings": _RATES, "kernels": _RATES},
        "link?": {"to_gpu_gbs": SPREAD, "to_host_gbs": SPREAD},
        "beside?": {
            "experts_gbs": SPREAD,
            "experts_beside_copies_gbs": SPREAD,
            "copies_gbs": SPREAD,
            "copies_beside_experts_gbs": SPREAD,
        },
        "pageable?": {"block_bytes": int, "gbs": dict},
        "pinning?": {"piece_bytes": int, "n_refused": int, "gbs?": SPREAD},
        "host?": {"read_gbs": NUMBER, "flop_per_s": NUMBER},
        "host_experts?": [_HOST_EXPERTS],
        "gpu?": {"read_gbs": NUMBER},
        "multiplying?": {"flop_per_s": NUMBER},
        "launches?": {"n_launches": int, "torch kernel": dict, "triton kernel": dict, "graph": dict},
        "slot_experts?": [_SLOT_EXPERTS],
        "recording?": {"records": bool, "why_not": str, "kinds": list, "host_layer_s": NUMBER},
        "machine_file?": str,
    },
    "decode": {
        "places?": [{**_PLACE, "n_slots": int, "n_experts": int, "gpu_bytes": int, "unavailable?": str}],
        "decode?": [_DECODED],
        "first_token?": [{**_PLACE, "n_prompt": int, "n_readings": int, "first_token_s": SPREAD}],
        "llama?": {"model": str, "unavailable?": str, "rows?": [{**_PLACE, "tokens_per_s": SPREAD}]},
    },
    "timeline": {
        "run?": {
            "model": str,
            "lanes": {"wall_s": NUMBER, "busy_s": dict, "overlap_s": dict, "nobody_s": NUMBER},
            "prediction": {"n_layers": int, "median": NUMBER, "p90": NUMBER},
            "files": {"json": str, "png": str},
        },
        "overhead?": {
            "model": str,
            "n_steps": int,
            "wall_s": SPREAD,
            "pieces_s": NUMBER,
            "experts_s": NUMBER,
            "overhead_s": NUMBER,
            "idle_s?": SPREAD,
        },
    },
    "resident": {
        "model?": str,
        "rows?": [{"n_sequences": int, "tokens_per_s": dict, "unavailable": dict, "over_best?": NUMBER}],
    },
    "summary": {"verdicts?": [{"claim": str, "goal": str, "found": str, "value?": NUMBER, "met?": bool}]},
}
COMMON: dict[str, Any] = {"part": str, "label": str, "complete": bool, "error?": str, "settings": dict}
GPU: dict[str, Any] = COMMON | {name: schema for part in PARTS.values() for name, schema in part.items()}
"""Of any part: no key is of two of them."""
