"""Writes tests/formats/published: matrices that public tools have quantised, and their own decoding of them.

Needs llmcompressor 0.14.0.1, compressed-tensors 0.20.0 and bitsandbytes 0.50.2, which nothing here installs: `pip
install --no-deps --target FOLDER` them with loguru, datasets, pyarrow, pandas, dill, xxhash, multiprocess, peft,
accelerate and nvidia-ml-py, and run `PYTHONPATH=.:FOLDER python tools/quantised_samples.py`, for half a minute.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.tiny import save_tiny

TO = Path(__file__).parents[1] / "tests" / "formats" / "published"
SCHEMES = ("W4A16", "W4A16_ASYM", "W8A16", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8A16")
SIZES = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "head_dim": 32}
IGNORED = ["lm_head", "re:.*mlp.gate$", "re:.*embed_tokens"]
MODULE = "model.layers.0.mlp.experts.1.down_proj"
ROWS = 16
"""Rows whose decoding is kept."""


def main() -> None:
    """Write every sample."""
    from llmcompressor import model_free_ptq

    TO.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = save_tiny(Path(folder) / "source", seed=1, num_hidden_layers=1, num_experts=2, **SIZES)
        for scheme in SCHEMES:
            made = Path(folder) / scheme
            model_free_ptq(str(source), str(made), scheme, ignore=IGNORED, device="cpu", max_workers=1)
            settings = json.loads((made / "config.json").read_text())["quantization_config"]
            parts = _parts(load_file(made / "model.safetensors"))
            _save(scheme.lower(), parts, _decompressed(parts, settings), settings)
        _nf4(load_file(source / "model.safetensors")[f"{MODULE}.weight"])


def _parts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{MODULE}."): t for name, t in tensors.items() if name.startswith(f"{MODULE}.")}


def _decompressed(parts: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    (scheme,) = QuantizationConfig.model_validate(settings).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format or settings["format"])
    decoded: Tensor = compressor.decompress(dict(parts), scheme)["weight"]
    return decoded


def _nf4(weight: Tensor) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    parts = {"weight": codes, **{f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}}
    _save("nf4", parts, dequantize_4bit(codes, state), {"quant_method": "bitsandbytes"})


def _save(name: str, parts: dict[str, Tensor], decoded: Tensor, settings: dict[str, Any]) -> None:
    tensors = {**parts, "decoded": decoded[:ROWS]}
    tensors = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    save_file(tensors, TO / f"{name}.safetensors", {"quantization_config": json.dumps(settings)})
    print(name, {key: (str(t.dtype), list(t.shape)) for key, t in tensors.items()}, file=sys.stderr)


if __name__ == "__main__":
    main()
