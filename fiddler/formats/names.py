"""Which stored tensors make one quantised tensor, by their names: every format's suffixes, in one pass.

A tensor's *base* is the name that a bf16 checkpoint gives it, as `….down_proj.weight`; its *roles* are the codes,
scales and the like that stand in its place. Each name is cut once, at its last dot: there may be 150,000.
"""

import re
from collections.abc import Iterable, Mapping

UNUSED = "unused"
"""Role of what only serves to quantise activations, which are not quantised here."""

_BESIDE_WEIGHT = {
    "weight_scale_inv": "scale",
    "weight_scale": "scale",
    "qscale_weight": "scale",
    "scale": "scale",
    "weight_scale_2": "scale_2",
    "weight_global_scale": "global_scale",
    "weight_packed": "packed",
    "weight_shape": "shape",
    "weight_zero_point": "zero_point",
    "weight_g_idx": "g_idx",
    "qweight": "qweight",
    "qzeros": "qzeros",
    "scales": "scales",
    "g_idx": "g_idx",
    "pre_quant_scale": "pre_quant_scale",
    **dict.fromkeys(
        ("input_scale", "activation_scale", "qscale_act", "input_global_scale", "input_zero_point", "output_scale"),
        UNUSED,
    ),
}
"""Last part of a name to its role, where the base ends in `.weight` in its place."""
_BELOW_WEIGHT = {
    "absmax": "absmax",
    "quant_map": "quant_map",
    "nested_absmax": "nested_absmax",
    "nested_quant_map": "nested_quant_map",
    "bitsandbytes__nf4": "state",
    "bitsandbytes__fp4": "state",
}
"""The same for bitsandbytes, which appends to the base."""
_JOINED = {
    "_blocks": "blocks",
    "_scales": "scale",
    "_packed": "packed",
    "_scale_inv": "scale",
    "_global_scale": "global_scale",
    "_input_scale": UNUSED,
    "_input_global_scale": UNUSED,
    "_scale_2": "scale_2",
    "_scale": "scale",
}
"""Endings that are joined to the name of a parameter, as `experts.gate_up_proj_blocks`."""
_ENDINGS = tuple(sorted(_JOINED, key=len, reverse=True))

Roles = dict[str, str]
"""Role to the stored tensor's name; more than one that is unused are told apart by a number."""


def groups(names: Iterable[str]) -> dict[str, Roles]:
    """Return the roles of every base that has any beside its own; `"weight"` is the tensor of that name itself."""
    found: dict[str, Roles] = {}
    for name in names:
        stem, _, last = name.rpartition(".")
        if last == "weight":
            continue
        if (role := _BESIDE_WEIGHT.get(last)) is not None:
            base = f"{stem}.weight"
        elif (role := _BELOW_WEIGHT.get(last)) is not None:
            base = stem.removesuffix(".quant_state")
        elif last.endswith(_ENDINGS):
            ending = next(ending for ending in _ENDINGS if last.endswith(ending))
            base, role = name[: -len(ending)].removesuffix("_weight"), _JOINED[ending]
        else:
            continue
        roles = found.setdefault(base, {})
        if role in roles:
            role = f"{role} {len(roles)}"
        roles[role] = name
    return found


def with_own(found: Mapping[str, Roles], names: Mapping[str, object]) -> None:
    """Add the tensor of a base's own name to its roles; a fused parameter may have `.weight` after it, or not."""
    for base, roles in found.items():
        for own in (base, f"{base}.weight", f"{base}_weight", base.removesuffix(".weight")):
            if own in names:
                roles["weight"] = own
                break


_EXPERT_LAST = re.compile(r"(.*\bexperts)\.(\w+)\.(\d+)\.weight")


def logical(base: str, *, fused: bool) -> str:
    """Return the name as a bf16 checkpoint has it: ModelOpt also writes `experts.gate_proj.3.weight`.

    A `fused` tensor is a parameter by itself, `experts.gate_up_proj`.
    """
    if fused:
        return base.removesuffix(".weight")
    if ".experts." in base and (found := _EXPERT_LAST.fullmatch(base)):
        path, matrix, expert = found.groups()
        return f"{path}.{expert}.{matrix}.weight"
    return base
