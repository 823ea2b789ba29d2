"""Tiny checkpoints as they are published quantised, each beside a twin in floats of the same numbers."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fiddler import Engine, EngineConfig
from fiddler.formats.packed import Packed
from fiddler.models.loaded import load
from tests.formats.writers import Writer
from tests.support.tiny import save_tiny

SIZES: dict[str, dict[str, int]] = {
    "qwen3_moe": {"hidden_size": 192, "moe_intermediate_size": 160, "intermediate_size": 160},
    "mixtral": {"hidden_size": 192, "intermediate_size": 160},
    "gpt_oss": {"hidden_size": 192, "intermediate_size": 160},
}
"""Divisible by 32 and not by 128."""
MATRICES = re.compile(r".*(experts\.\d+\.\w+|self_attn\.[qkvo]_proj)\.weight")
"""Matrices that publishers quantise."""
PROMPTS: Sequence[Sequence[int]] = ([5, 6, 7, 8, 9, 10, 11, 100, 3, 77, 4, 5, 60, 9, 31, 2, 8, 15, 44], [12])
N_TOKENS = 5


@dataclass(frozen=True)
class Pair:
    """A quantised folder, and one of the same numbers in float32."""

    quantised: Path
    twin: Path


def save_pair(folder: Path, kind: str, write: Writer, settings: dict[str, Any], **sizes: Any) -> Pair:
    """Write a tiny checkpoint of `kind`, its matrices by `write`, with `settings` as its `quantization_config`."""
    source, tensors = save_source(folder, kind, **sizes)
    stored, decoded = quantised(tensors, write)
    return saved(folder, source, stored, decoded, settings)


def save_source(folder: Path, kind: str = "qwen3_moe", **sizes: Any) -> tuple[Path, dict[str, Tensor]]:
    """Write a tiny checkpoint to be quantised; returns it, and its tensors.

    Its logits are small. Else log-probabilities in bf16 hang on the order of sums by 0.03, and more than is tested.
    """
    source = save_tiny(folder / "source", kind, **{"seed": 1, "num_hidden_layers": 2, **SIZES[kind], **sizes})
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] /= 4
    return source, tensors


def quantised(tensors: dict[str, Tensor], write: Writer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors with their matrices replaced, and decoded."""
    stored, decoded = dict(tensors), dict(tensors)
    for name in [name for name in tensors if MATRICES.fullmatch(name)]:
        parts, decoded[name] = write(stored.pop(name).float())
        stem = name.removesuffix("weight")
        stored |= {
            stem + ending: part.clone(memory_format=torch.contiguous_format) for ending, part in parts.items()
        }
    return stored, decoded


def saved(
    folder: Path, source: Path, stored: dict[str, Tensor], decoded: dict[str, Tensor], settings: dict[str, Any]
) -> Pair:
    """Write both folders beside each other, with the files of `source`."""
    pair = Pair(folder / "quantised", folder / "twin")
    for to, content in ((pair.quantised, stored), (pair.twin, decoded)):
        to.mkdir(parents=True)
        for file in source.iterdir():
            if file.suffix != ".safetensors":
                (to / file.name).write_bytes(file.read_bytes())
        save_file(content, to / "model.safetensors", {"format": "pt"})
    edit(pair.quantised, quantization_config=settings)
    return pair


def edit(folder: Path, **changes: Any) -> None:
    """Change a folder's configuration."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


WAYS: Sequence[dict[str, Any]] = (
    {"device": "cpu", "store": "mapped"},
    {"device": "cpu", "store": "packed"},
    {"device": "sim", "slots": 6},
)
"""Every place that experts are read from."""
WITHIN = {"float32": 1e-4, "bfloat16": 0.02}
"""By how much log-probabilities may differ."""


async def agrees(pair: Pair, within: Mapping[str, float] = WITHIN) -> None:
    """Hold the engine's log-probabilities of its tokens against those that transformers has on the twin."""
    (named,) = json.loads((pair.twin / "config.json").read_text())["architectures"]
    cls = getattr(transformers, named)
    for dtype, most in within.items():
        model = cls.from_pretrained(pair.twin, dtype=getattr(torch, dtype)).eval()
        for way in WAYS:
            # transformers rounds decoded weights to bfloat16, which our kernels do not: on these models the two are
            # then as far from each other as from float32.
            kernels = "linear" if dtype == "bfloat16" else "auto"
            worst = await error(pair, model, EngineConfig(dtype=dtype, kernels=kernels, **way))  # type: ignore[arg-type]
            assert worst < most, (dtype, way)


async def error(pair: Pair, model: Any, config: EngineConfig) -> float:
    """Return by how much the engine's log-probabilities of its tokens differ from the model's, at most."""
    worst = 0.0
    async with Engine(pair.quantised, config) as engine:
        for prompt in PROMPTS:
            async with engine.generate_stream(
                list(prompt), max_new_tokens=N_TOKENS, do_sample=False, logprobs=True, eos_token_id=-1
            ) as stream:
                tokens = [token async for token in stream]
            assert len(tokens) == N_TOKENS
            ids = torch.tensor([[*prompt, *(token.id for token in tokens)]])
            with torch.inference_mode():
                logprobs = model(ids).logits[0].float().log_softmax(-1)
            for at, token in enumerate(tokens, len(prompt) - 1):
                assert token.logprob is not None
                worst = max(worst, abs(token.logprob - float(logprobs[at, token.id])))
    assert math.isfinite(worst)
    return worst


def packed_bits(pair: Pair) -> float:
    """Return the bits that an expert's number takes as it is run, scales and all."""
    loaded = load(pair.quantised, EngineConfig(store="mapped"))
    weights = loaded.weights(0, 3)
    assert all(isinstance(matrix, Packed) for matrix in weights.matrices)
    return 8 * sum(m.nbytes for m in weights.matrices) / sum(math.prod(m.shape) for m in weights.matrices)
