"""Finds experts in a GGUF file: every architecture has them as `blk.L.ffn_{gate,up,down}_exps`, `[E, out, in]`."""

import re

from fiddler.errors import CheckpointError
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.mapped import Select, View

EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.(weight|bias)")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_PARTS = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}


def expert_views(path: str, parameter: str, n_experts: int, checkpoint: Checkpoint) -> list[tuple[View, ...]]:
    """Return one parameter's views by expert, gate before up. Raises `CheckpointError` where it has no tensors."""
    found = _LAYER.search(path)
    assert found is not None, "all that are run from GGUF number their layers so"
    stem, bias = parameter.removesuffix("_bias"), parameter.endswith("_bias")
    names = [f"blk.{found[1]}.ffn_{part}_exps.{'bias' if bias else 'weight'}" for part in _PARTS[stem]]
    joined = names[0].replace("ffn_gate_", "ffn_gate_up_")
    names = [joined] if joined in checkpoint.entries else names
    if missing := [name for name in names if name not in checkpoint.entries]:
        raise CheckpointError(f"{checkpoint.folder} has no tensor {missing[0]!r}; download it again")
    return [tuple(View(name, (Select(expert),)) for name in names) for expert in range(n_experts)]
