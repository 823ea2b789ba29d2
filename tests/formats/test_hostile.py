"""Damaged and hostile quantised tensors: an error that names them, or defined values, and no error of torch's."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fiddler import Engine, EngineConfig
from fiddler.errors import CheckpointError, EngineFailedError, ModelError, UnsupportedModelError
from fiddler.formats.quantised import refuse_unread
from fiddler.models.loaded import load
from fiddler.store.checkpoint import Checkpoint
from tests.formats.folders import edit, save_pair
from tests.formats.writers import Writer, awq, fp8, fp8_scalar, gptq, integers, mxfp4, mxfp8, nf4, nvfp4
from tests.support.tiny import N_EXPERTS

NAME = "model.layers.0.mlp.experts.0.down_proj."
GROUPS = {"config_groups": {"a": {"weights": {"num_bits": 4, "group_size": 32}}}}
FORMATS: dict[str, tuple[Writer, dict[str, Any]]] = {
    "fp8 block": (fp8(128, 128), {"weight_block_size": [128, 128]}),
    "fp8 channel": (fp8(1, 0, "weight_scale"), {}),
    "fp8 tensor": (fp8_scalar("weight_scale"), {}),
    "mxfp8": (mxfp8("weight_scale_inv"), {}),
    "mxfp4": (mxfp4("weight_packed", "weight_scale"), {}),
    "deepseek": (mxfp4("weight", "scale", signed=True, typed=True), {}),
    "modelopt": (nvfp4("weight", "weight_scale_2"), {}),
    "nvfp4": (nvfp4("weight_packed", "weight_global_scale", divides=True), {}),
    "int4": (integers(4, 32), GROUPS),
    "int4 asymmetric": (integers(4, 32, symmetric=False), GROUPS),
    "gptq": (gptq(4, 32), {"bits": 4, "group_size": 32}),
    "awq": (awq(32), {"bits": 4, "group_size": 32}),
    "nf4": (nf4(nested=False), {}),
    "nf4 nested": (nf4(nested=True), {}),
}


def changed(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor damaged in many ways."""
    flat = tensor.flatten()
    yield from (flat, flat[:0], flat[:1], flat[:1].reshape(()), flat[:-1], tensor[None], tensor[..., None])
    if tensor.dim():
        yield from (
            tensor[:0],
            tensor[:-1],
            tensor.repeat_interleave(2, 0) if tensor.dtype != torch.float8_e8m0fnu else flat[:2],
        )
        yield tensor.flatten(-2).unflatten(-1, (-1, 1)) if tensor.dim() > 1 else tensor
    if tensor.dim() == 2:
        yield from (tensor[:, :-1], tensor[:, :0], tensor.t())
    for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.float8_e4m3fn, torch.bool):
        yield tensor.float().nan_to_num().clamp(0, 200).to(dtype)


def opened(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> Tensor | None:
    """Return what the tensors decode to, `None` where that is refused."""
    save_file(
        {NAME + ending: t.clone(memory_format=torch.contiguous_format) for ending, t in tensors.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    try:
        checkpoint = Checkpoint.open(folder)
        refuse_unread(checkpoint.entries)
        return checkpoint.tensor(NAME + "weight")
    except ModelError:
        return None


@pytest.mark.parametrize("name", FORMATS)
def test_every_part_may_be_damaged(tmp_path: Path, name: str) -> None:
    write, settings = FORMATS[name]
    w = torch.linspace(-1, 1, 64 * 128).sin().view(64, 128)
    parts, decoded = write(w)
    found = opened(tmp_path, parts, settings)
    assert found is not None
    assert torch.allclose(found, decoded, atol=1e-6)
    refused = 0
    for part, tensor in parts.items():
        assert opened(tmp_path, {k: v for k, v in parts.items() if k != part}, settings) is None or part in OPTIONAL
        for damaged in changed(tensor):
            made = opened(tmp_path, parts | {part: damaged}, settings)
            refused += made is None
    assert refused > 10


OPTIONAL = {"activation_scale", "input_scale", "weight_shape", "g_idx", "weight_zero_point", "weight.quant_map"}
"""Parts without which a tensor is another, or the same."""
NONSENSE: list[Any] = [None, [], {}, "x", -1, 0, 1e400, True, [[]], {"a": 5}, {"a": {"weights": []}}, [128, -1], 7]


@pytest.mark.parametrize("name", FORMATS)
def test_settings_may_be_nonsense(tmp_path: Path, name: str) -> None:
    write, settings = FORMATS[name]
    parts, _ = write(torch.linspace(-1, 1, 64 * 128).sin().view(64, 128))
    for key in ("bits", "group_size", "weight_block_size", "config_groups", "version", "checkpoint_format"):
        for value in NONSENSE:
            opened(tmp_path, parts, settings | {key: value})
    for key in ("num_bits", "group_size", "block_structure"):
        for value in NONSENSE:
            opened(tmp_path, parts, {"config_groups": {"a": {"weights": {"num_bits": 4} | {key: value}}}})


Change = Callable[[dict[str, Tensor]], None]


def damaged(folder: Path, change: Change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_pair(tmp_path, "qwen3_moe", fp8(128, 128), {"quant_method": "fp8"}).quantised


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.pop(f"{NAME}weight_scale_inv"), UnsupportedModelError, "or without its scales"),
        (lambda t: t.pop(f"{NAME}weight"), CheckpointError, r"layers\.0\.mlp\.experts"),
        (
            lambda t: t.update({f"{NAME}weight_scale_inv": torch.ones(3, 3)}),
            CheckpointError,
            r"\[3, 3\] where .*down_proj",
        ),
        (lambda t: t.update({f"{NAME}weight": t[f"{NAME}weight"][:-1]}), CheckpointError, r"down_proj"),
        (lambda t: t.update({f"{NAME}weight_scale": torch.ones(1)}), CheckpointError, "beside another of its kind"),
        (lambda t: t.update({f"{NAME}pre_quant_scale": torch.ones(160)}), UnsupportedModelError, "pre_quant_scale"),
    ],
    ids=["no scales", "no codes", "other scales", "fewer codes", "two scales", "scaled activations"],
)
@pytest.mark.parametrize("store", ["mapped", "packed"])
def test_a_damaged_expert_is_named_when_it_is_opened(
    tiny: Path, change: Change, error: type[ModelError], words: str, store: Any
) -> None:
    with pytest.raises(error, match=words):
        load(damaged(tiny, change), EngineConfig(store=store))


def _last_in_floats(tensors: dict[str, Tensor]) -> None:
    """Store the last expert's down as floats, where the others have codes."""
    stem = f"model.layers.0.mlp.experts.{N_EXPERTS - 1}.down_proj."
    for name in [name for name in tensors if name.startswith(stem)]:
        del tensors[name]
    tensors[f"{stem}weight"] = torch.zeros(192, 160)


SOME_INT4 = {"num_bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    ("write", "scheme", "change", "error", "words"),
    [
        (
            integers(4, 32, symmetric=False),
            {},
            lambda t: t.pop(f"{NAME}weight_zero_point"),
            UnsupportedModelError,
            "in one format for a layer",
        ),
        (
            integers(4, 32),
            {},
            lambda t: t.update({f"{NAME}weight_scale": t[f"{NAME}weight_scale"].float()}),
            UnsupportedModelError,
            "in one format for a layer",
        ),
        (
            integers(4, 32),
            {},
            _last_in_floats,
            UnsupportedModelError,
            r"7\.down_proj\.weight' is F32, .*in one format for a layer",
        ),
        (
            integers(4, 32),
            {"symmetric": False},
            lambda t: None,
            CheckpointError,
            r"lacks the weight_zero_point that config\.json promises \(symmetric=false\)",
        ),
        (
            integers(4, 32),
            {},
            lambda t: t.update({f"{NAME}weight_packed": t[f"{NAME}weight_packed"].long()}),
            UnsupportedModelError,
            r"down_proj\.weight_packed' is I64 .*does not read",
        ),
        (
            integers(4, 32),
            {},
            lambda t: t.update({f"{NAME}weight": torch.zeros(192, 160)}),
            CheckpointError,
            r"is there twice, as '.*weight_packed' and '.*down_proj\.weight'",
        ),
    ],
    ids=[
        "one without zeros",
        "one of other scales",
        "the last expert in floats",
        "all without zeros",
        "codes of 64 bits",
        "floats beside codes",
    ],
)
@pytest.mark.parametrize("store", ["mapped", "packed"])
def test_integers_that_are_not_of_one_kind(
    tmp_path: Path,
    write: Writer,
    scheme: dict[str, Any],
    change: Change,
    error: type[ModelError],
    words: str,
    store: Any,
) -> None:
    settings = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": SOME_INT4 | scheme}}}
    folder = save_pair(tmp_path, "qwen3_moe", write, settings).quantised
    with pytest.raises(error, match=words):
        load(damaged(folder, change), EngineConfig(store=store))


def test_bits_that_are_not_those_of_the_codes_are_named(tmp_path: Path) -> None:
    settings = {"config_groups": {"a": {"weights": {"num_bits": 8, "group_size": 32}}}}
    parts, _ = integers(4, 32)(torch.linspace(-1, 1, 64 * 128).sin().view(64, 128))
    save_file({NAME + ending: part for ending, part in parts.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    with pytest.raises(
        CheckpointError, match=r"64 x 64 by its codes of 8 bits, and \[64, 128\] .*correct num_bits in config\.json"
    ):
        Checkpoint.open(tmp_path).tensor(f"{NAME}weight")


@pytest.mark.parametrize("nested", [True, False])
def test_nf4_s_description_counts_for_nothing(tmp_path: Path, nested: bool) -> None:
    """Its JSON is longer in one matrix than in another, and matrices of a layer are held against each other."""
    sizes = {"moe_intermediate_size": 128, "intermediate_size": 128}
    folder = save_pair(
        tmp_path, "qwen3_moe", nf4(nested=nested), {"quant_method": "bitsandbytes"}, **sizes
    ).quantised
    sizes_found = {e.nbytes for name, e in Checkpoint.open(folder).entries.items() if ".experts." in name}
    blocks = 128 * 192 // 64
    assert sizes_found == {128 * 192 // 2 + (blocks + 4 * -(-blocks // 256) if nested else 4 * blocks)}


@pytest.mark.anyio
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
async def test_scales_that_are_no_numbers_fail_a_request_and_no_more(tiny: Path, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if re.search(r"experts\.\d+\.down_proj\.weight_scale_inv", name):
                tensors[name] = torch.full_like(tensors[name], value)

    async with Engine(damaged(tiny, change)) as engine:
        for _ in range(2):
            with pytest.raises(EngineFailedError, match="not numbers"):
                await engine.generate([1, 2, 3], max_new_tokens=2)


def test_a_method_that_is_not_read_is_named_with_what_is(tiny: Path) -> None:
    edit(tiny, quantization_config={"quant_method": "hqq", "bits": 4})
    with pytest.raises(
        UnsupportedModelError, match=r"quantised \('hqq'\).*about 0\.0 GB.*compressed-tensors.*gptq"
    ):
        load(tiny, EngineConfig())
