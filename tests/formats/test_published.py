"""Matrices that public tools quantised are decoded as by those tools; `tools/quantised_samples.py` wrote them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fiddler.formats.quantised import Quantised
from fiddler.store.checkpoint import Checkpoint

SAMPLES = sorted((Path(__file__).parent / "published").glob("*.safetensors"))
NAME = "model.layers.0.mlp.experts.1.down_proj."


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.stem)
def test_values_are_those_of_the_tool(sample: Path, tmp_path: Path) -> None:
    tensors = load_file(sample)
    decoded = tensors.pop("decoded")
    with safe_open(sample, "pt") as opened:
        settings = json.loads(opened.metadata()["quantization_config"])
    save_file({NAME + name: tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.entries) == [f"{NAME}weight"]
    entry = checkpoint.entries[f"{NAME}weight"]
    assert isinstance(entry, Quantised)
    assert entry.shape == (128, 128)
    found = checkpoint.tensor(f"{NAME}weight")[: len(decoded)]
    near = 1e-6 if decoded.dtype == torch.float32 else 1e-2
    assert torch.allclose(found, decoded.float(), rtol=near, atol=1e-7)


def test_every_scheme_is_there() -> None:
    assert len(SAMPLES) == 9
