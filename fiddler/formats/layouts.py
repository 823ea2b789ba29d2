"""Quantised formats by name, with the bytes that a matrix takes in each. No torch: simulations count with it.

Sources: FP8 in blocks as DeepSeek-V3 is published; MXFP8 and MXFP4 of OCP Microscaling Formats 1.0; NVFP4 of
ModelOpt; integers as compressed-tensors has them; blocks of ggml-common.h of llama.cpp.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Layout:
    """Bits of a code, and the block of numbers that shares a scale."""

    bits: int
    rows: int
    """Rows of a block; the last blocks of a matrix may be smaller, down and across."""
    columns: int | None
    """Columns of a block; `None`: the whole row."""
    scale_bytes: int
    """Bytes of all scales and minima of one block."""
    fills: bool = False
    """Whether blocks must fill a row."""

    def nbytes(self, out: int, columns: int) -> int:
        """Return the bytes of a matrix `[out, columns]`, codes and scales.

        Raises `ValueError` where blocks must fill a row and do not.
        """
        across = self.columns or columns
        if self.fills and columns % across:
            raise ValueError(f"rows of {columns} columns are not filled by blocks of {across}")
        codes = out * -(-columns * self.bits // 8)
        return codes + -(-out // self.rows) * -(-columns // across) * self.scale_bytes


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "fp8": Layout(8, 128, 128, 4),
        "fp8-rows": Layout(8, 1, None, 2),
        "mxfp8": Layout(8, 1, 32, 1),
        "mxfp4": Layout(4, 1, 32, 1),
        "nvfp4": Layout(4, 1, 16, 1),
        "int8": Layout(8, 1, None, 2),
        "int4": Layout(4, 1, 32, 2),
        "int4-128": Layout(4, 1, 128, 3),
        "q8_0": Layout(8, 1, 32, 2, fills=True),
        "q4_0": Layout(4, 1, 32, 2, fills=True),
        "q6_k": Layout(6, 1, 256, 18, fills=True),
        "q5_k": Layout(5, 1, 256, 16, fills=True),
        "q4_k": Layout(4, 1, 256, 16, fills=True),
    }
)
"""By name. `int4`, `int8` and `fp8-rows` are those that `fiddler quantize` writes; `int4-128` is GPTQ and AWQ as
they are repacked, a zero beside each scale. NVFP4's scale of a whole matrix, 4 bytes, is left out."""

_COMPRESSED = {
    ("pack-quantized", 4): "int4",
    ("pack-quantized", 8): "int8",
    ("int-quantized", 8): "int8",
    ("float-quantized", 8): "fp8-rows",
    ("mxfp8-quantized", 8): "mxfp8",
    ("mxfp4-pack-quantized", 4): "mxfp4",
    ("nvfp4-pack-quantized", 4): "nvfp4",
}
"""Formats of compressed-tensors, and bits."""


def announced_layout(config: Mapping[str, Any]) -> str | None:
    """Return the layout of experts by a `config.json`; `None` for floats.

    A guess for what was not downloaded, whose headers would say it. Raises `ValueError` for a `quantization_config`
    that says none of the layouts.
    """
    about = config.get("quantization_config") or config.get("compression_config")
    if not about:
        return None
    found = _announced(about) if isinstance(about, Mapping) else None
    if found is None:
        raise ValueError(f"quantization_config does not say one of {', '.join(LAYOUTS)}")
    return "mxfp4" if config.get("expert_dtype") == "fp4" else found


def _announced(about: Mapping[str, Any]) -> str | None:
    method = about.get("quant_method")
    if method in ("mxfp4", "mxfp8"):
        return str(method)
    if method == "fp8":
        return "fp8" if about.get("weight_block_size") else "fp8-rows"
    if method in ("gptq", "awq"):
        return "int4-128" if (about.get("bits"), about.get("group_size")) == (4, 128) else None
    if method == "modelopt":
        return {"NVFP4": "nvfp4", "FP8": "fp8-rows"}.get(str(about.get("quant_algo")))
    if method == "compressed-tensors":
        groups = about.get("config_groups")
        first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
        weights = first.get("weights") if isinstance(first, Mapping) else None
        bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
        return _COMPRESSED.get((str(about.get("format")), bits)) if isinstance(bits, int) else None
    return None
