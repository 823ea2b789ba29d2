"""Finds a checkpoint's quantised tensors among the stored ones, each by its own headers, so that kinds may mix."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from fiddler.errors import CheckpointError, UnsupportedModelError
from fiddler.formats.awq import Awq
from fiddler.formats.fp8 import Fp8
from fiddler.formats.gptq import Gptq
from fiddler.formats.integers import SHAPE, Integers, widths
from fiddler.formats.mxfp4 import MxFp4
from fiddler.formats.names import UNUSED, Roles, logical, with_own
from fiddler.formats.nf4 import Nf4, read_state
from fiddler.formats.nvfp4 import NvFp4
from fiddler.formats.quantised import Files, Parts, Quantised, Settings, Stored

MOST_BYTES = 64
"""Of a matrix's `weight_shape`; it has 16."""
Header = TypeVar("Header", bound=Stored)
Of = Callable[[str, Parts, Settings], Quantised | None]

FORMATS: Mapping[str, tuple[Of, ...]] = {
    "blocks": (MxFp4.of,),
    "packed": (NvFp4.of, Integers.of, MxFp4.of),
    "qweight": (Gptq.of, Awq.of),
    "state": (Nf4.of,),
    "weight": (Fp8.of, NvFp4.of, Integers.of, MxFp4.of),
}
"""Role of the codes to the formats that have it."""


def find(
    found: Mapping[str, Roles], stored: Mapping[str, Header], settings: Settings, files: Files
) -> dict[str, Header | Quantised]:
    """Return the tensors by the names that a bf16 checkpoint gives them, quantised ones in place of their parts.

    `found` are the `groups` of the stored tensors' names; of `files` only states of bitsandbytes are read,
    and shapes where integers of several widths are mixed.

    Raises `CheckpointError` for parts that do not belong together, and `UnsupportedModelError` for a format that is
    not read.
    """
    with_own(found, stored)
    entries: dict[str, Header | Quantised] = dict(stored)
    known: dict[tuple[object, ...], Quantised | None] = {}
    mixed = len(widths(settings)) > 1
    for base, roles in found.items():
        # Most tensors are like another but for their names, and there may be 50,000 of them.
        kind: tuple[object, ...] = tuple(
            (role, stored[name].dtype, stored[name].shape) for role, name in roles.items()
        )
        about = settings
        if "state" in roles:
            about = {"state": read_state(base, files.stored(roles["state"]))}
            kind = (*kind, str(about))
        elif mixed and "shape" in roles and stored[roles["shape"]].nbytes <= MOST_BYTES:
            about = {**settings, SHAPE: files.stored(roles["shape"]).tolist()}
            kind = (*kind, str(about[SHAPE]))
        if kind not in known:
            known[kind] = _read(base, {role: (name, stored[name]) for role, name in roles.items()}, about)
        like = known[kind]
        if like is None:
            continue
        for name in roles.values():
            del entries[name]
        quantised = like.named(logical(base, fused=len(like.shape) == 3), roles)
        entries[quantised.name] = quantised
    return entries


def _read(base: str, parts: Parts, settings: Settings) -> Quantised | None:
    codes = next((role for role in FORMATS if role in parts), None)
    if codes is None:
        return None
    name, header = parts.get("weight" if codes == "state" else codes, parts[codes])
    if len(header.shape) < 2 or any(0 in each.shape for _, each in parts.values()):
        raise CheckpointError(
            f"tensor {name!r} is {header.dtype} {list(header.shape)} beside {', '.join(parts)}, which makes no "
            "matrix; download the checkpoint again"
        )
    if len(both := [parts[role][0] for role in FORMATS if role in parts and role != "state"]) > 1:
        raise CheckpointError(
            f"{base} is there twice, as {both[0]!r} and {both[1]!r}; download the checkpoint again"
        )
    if twice := [name for role, (name, _) in parts.items() if " " in role and not role.startswith(UNUSED)]:
        raise CheckpointError(f"{base} has {twice[0]!r} beside another of its kind; download the checkpoint again")
    if "pre_quant_scale" in parts:
        raise UnsupportedModelError(
            f"{base} has a pre_quant_scale, which scales activations (AWQ in ModelOpt); Fiddler does not apply it"
        )
    for of in FORMATS[codes]:
        if (quantised := of(base, parts, settings)) is not None:
            return quantised
    return None
