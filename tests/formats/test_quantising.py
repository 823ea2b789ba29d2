"""A checkpoint written anew: its experts in codes, everything else as it was, and gone on with after a stop."""

import json
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fiddler import EngineConfig
from fiddler.errors import CheckpointError, ConfigError, UnsupportedModelError
from fiddler.formats.quantise import TARGETS
from fiddler.models.loaded import load
from fiddler.models.quantising import Conversion
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.target import UNFINISHED
from tests.architectures.model import build
from tests.support.tiny import save_tiny

SIZES = {"hidden_size": 64, "moe_intermediate_size": 96, "intermediate_size": 96}


def source(folder: Path, kind: str = "qwen3_moe", **sizes: int) -> Path:
    return save_tiny(folder / "source", kind, **{**SIZES, **sizes})


def halves(folder: Path) -> Path:
    """Return a source of two files."""
    whole = source(folder)
    tensors = load_file(whole / "model.safetensors")
    names = sorted(tensors)
    places = {name: f"model-0000{1 + (i >= len(names) // 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, whole / file)
    (whole / "model.safetensors").unlink()
    (whole / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return whole


def decoded(tensors: dict[str, torch.Tensor], stem: str, to: str) -> torch.Tensor:
    """Decode a matrix by compressed-tensors' own rules, number by number."""
    scale = tensors[f"{stem}.weight_scale"].float()
    if to == "fp8":
        return tensors[f"{stem}.weight"].float() * scale
    words, (out, columns) = tensors[f"{stem}.weight_packed"], tensors[f"{stem}.weight_shape"].tolist()
    bits = TARGETS[to].code.bits
    codes = torch.stack([(words >> shift) & (2**bits - 1) for shift in range(0, 32, bits)], dim=-1).flatten(1)
    return (codes.float() - 2 ** (bits - 1)).view(out, scale.shape[1], -1).mul(scale[..., None]).view(out, columns)


@pytest.mark.parametrize("to", TARGETS)
def test_experts_are_codes_and_the_rest_is_as_it_was(tmp_path: Path, to: str) -> None:
    before = source(tmp_path)
    (before / "chat_template.jinja").write_text("{{ messages }}")
    written = Conversion.of(before, to).write(tmp_path / "new")
    old, new = load_file(before / "model.safetensors"), load_file(written.folder / "model.safetensors")
    experts = {name for name in old if ".experts." in name}
    for name in old.keys() - experts:
        assert torch.equal(old[name], new.pop(name))
    for name in experts:
        stem = name.removesuffix(".weight")
        found = decoded(new, stem, to)
        assert (found - old[name]).norm() / old[name].norm() < {"int4": 0.11, "int8": 0.01, "fp8": 0.04}[to]
        for ending in ("weight", "weight_packed", "weight_scale", "weight_shape"):
            new.pop(f"{stem}.{ending}", None)
    assert not new
    assert (written.folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert set(written.errors) == {0, 1, 2}
    assert all(0.0 < error < 0.11 for error in written.errors.values())
    assert written.written_bytes < written.source_bytes


def test_the_configuration_says_how(tmp_path: Path) -> None:
    written = Conversion.of(source(tmp_path), "int4").write(tmp_path / "new")
    said = json.loads((written.folder / "config.json").read_text())["quantization_config"]
    weights = said["config_groups"]["group_0"]["weights"]
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", "pack-quantized")
    assert (weights["num_bits"], weights["strategy"], weights["group_size"], weights["symmetric"]) == (
        4,
        "group",
        32,
        True,
    )
    assert {"lm_head", r"re:model\.layers\.\d+\.self_attn\.q_proj"} <= set(said["ignore"])
    assert not any("experts" in name for name in said["ignore"])


class StoppedError(Exception):
    pass


def test_it_goes_on_where_it_ended(tmp_path: Path) -> None:
    before = halves(tmp_path)
    whole = Conversion.of(before, "int4").write(tmp_path / "whole")
    conversion, left = Conversion.of(before, "int4"), 0
    with safe_open(str(tmp_path / "whole" / "model-00001-of-00002.safetensors"), framework="pt") as first:
        n_first = sum(name.endswith("weight_packed") for name in first.keys())  # noqa: SIM118 - no mapping

    def stop() -> None:
        nonlocal left
        left += 1
        if left > n_first:
            raise StoppedError

    with pytest.raises(StoppedError):
        conversion.write(tmp_path / "new", stop)
    assert not (tmp_path / "new" / "config.json").exists()
    n_done = 0

    def count() -> None:
        nonlocal n_done
        n_done += 1

    again = Conversion.of(before, "int4")
    written = again.write(tmp_path / "new", count)
    assert (written.n_resumed, n_done) == (1, again.n_matrices)
    assert written.errors == pytest.approx(whole.errors)
    assert written.written_bytes == whole.written_bytes
    for file in (tmp_path / "whole").iterdir():
        other = tmp_path / "new" / file.name
        if file.suffix == ".safetensors":  # the header's order is anybody's
            old, new = load_file(file), load_file(other)
            assert old.keys() == new.keys()
            assert all(torch.equal(old[name], new[name]) for name in old)
        else:
            assert other.read_bytes() == file.read_bytes()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    conversion = Conversion.of(source(tmp_path), "int8")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    for folder in (other, tmp_path / "source"):
        with pytest.raises(ConfigError, match="give another folder"):
            conversion.write(folder)
    Conversion.of(tmp_path / "source", "int4").write(tmp_path / "int4")
    with pytest.raises(ConfigError, match="not of the same conversion"):
        conversion.write(tmp_path / "int4")
    assert [file.name for file in other.iterdir()] == ["thesis.tex"]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    conversion = Conversion.of(source(tmp_path), "int8")
    with pytest.raises(ConfigError, match="not a folder"):
        conversion.write(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be written"):
        conversion.write(tmp_path / "file" / "below")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot be written: .*; free some space"):
            conversion.write(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert conversion.write(tmp_path / "new").n_resumed == 0


def test_a_killed_run_s_leavings_are_taken_away(tmp_path: Path) -> None:
    conversion = Conversion.of(source(tmp_path), "int8")
    left = tmp_path / "new" / UNFINISHED
    left.mkdir(parents=True)
    (left / ".tmpUkHBY4").write_bytes(b"safetensors' own, in the middle of a file")
    (left / "model.safetensors").write_bytes(b"ours")
    whole = Conversion.of(tmp_path / "source", "int8").write(tmp_path / "whole")
    written = conversion.write(tmp_path / "new")
    assert {file.name for file in written.folder.iterdir()} == {file.name for file in whole.folder.iterdir()}
    assert not left.exists()


def test_what_cannot_be_quantised(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="to='int3' is not one of int4, int8, fp8"):
        Conversion.of(source(tmp_path / "a"), "int3")
    with pytest.raises(ConfigError, match="multiple of 32 numbers, and down_proj has 40; use to='int8'"):
        Conversion.of(source(tmp_path / "b", moe_intermediate_size=40), "int4")
    with pytest.raises(ConfigError, match=r"to='int8' needs rows of a multiple of 4 .* has 30; use to='fp8'"):
        Conversion.of(source(tmp_path / "e", moe_intermediate_size=30), "int8")
    Conversion.of(source(tmp_path / "f", moe_intermediate_size=30), "fp8").write(tmp_path / "f-new")
    for to in ("int8", "int4"):
        with pytest.raises(ConfigError, match="and gate_up_proj has 66; use to='fp8'"):
            Conversion.of(source(tmp_path / to, hidden_size=66), to)
    with pytest.raises(UnsupportedModelError, match="'gpt_oss' have biases or a gate of their own"):
        Conversion.of(save_tiny(tmp_path / "c", "gpt_oss"), "int4")
    bad = source(tmp_path / "d")
    tensors = load_file(bad / "model.safetensors")
    name = next(name for name in tensors if ".experts." in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, bad / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts.* cannot be quantised: a number is not finite"):
        Conversion.of(bad, "int8").write(tmp_path / "d-new")


def test_a_quantised_one_is_refused(tmp_path: Path) -> None:
    written = Conversion.of(source(tmp_path), "int8").write(tmp_path / "new")
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        Conversion.of(written.folder, "int4")


@pytest.mark.parametrize(
    "name", ["qwen3_5_moe", "deepseek_v3", "mixtral", "jamba", "nemotron_h", "granitemoe", "aria"]
)
def test_other_names_and_fused_experts(tmp_path: Path, name: str) -> None:
    """Gate and up in one tensor, experts in one tensor, `[in, out]`, no gate: all become a matrix an expert."""
    build(name).save_pretrained(tmp_path / "source")
    conversion = Conversion.of(tmp_path / "source", "int8")
    written = conversion.write(tmp_path / "new")
    new = load_file(written.folder / "model.safetensors")
    stems = {tensor.removesuffix(".weight_packed") for tensor in new if tensor.endswith(".weight_packed")}
    assert len(stems) == conversion.n_matrices
    assert all(new[f"{stem}.weight_scale"].shape[0] == new[f"{stem}.weight_shape"][0] for stem in stems)
    assert all(error < 0.01 for error in written.errors.values())
    assert written.transformers_reads == (name not in ("granitemoe", "aria"))
    config = EngineConfig(dtype="float32")
    before, after = (load(folder, config).weights(0, 1) for folder in (tmp_path / "source", written.folder))
    for floats, codes in ((before.up, after.up), ((before.down,), (after.down,))):
        one, other = torch.cat(list(floats)), torch.cat([matrix.dense(torch.float32) for matrix in codes])
        assert (one - other).norm() < 0.01 * one.norm()


def test_experts_of_a_layer_that_guesses_ahead_are_copied(tmp_path: Path) -> None:
    """As DeepSeek and GLM have it: behind the last layer, with names like those of the others."""
    before = source(tmp_path)
    tensors = load_file(before / "model.safetensors")
    extra = {name.replace(".2.", ".3.", 1): t.clone() for name, t in tensors.items() if ".layers.2." in name}
    save_file(tensors | extra, before / "model.safetensors", {"format": "pt"})
    written = Conversion.of(before, "int8").write(tmp_path / "new")
    new = load_file(written.folder / "model.safetensors")
    assert all(torch.equal(new[name], tensor) for name, tensor in extra.items())
    said = json.loads((written.folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert r"re:model\.layers\.3\.mlp\.experts\.\d+\.up_proj" in said
    quantised = {name.removesuffix(".weight_packed") for name in new if name.endswith(".weight_packed")}
    kept = {name.removesuffix(".weight") for name in new if name.endswith("_proj.weight")}
    patterns = [re.compile(each.removeprefix("re:")) for each in said]
    assert {name for name in quantised | kept if any(p.fullmatch(name) for p in patterns)} == kept


def test_weights_of_another_name_are_found_again(tmp_path: Path) -> None:
    before = source(tmp_path)
    (before / "model.safetensors").rename(before / "weights.safetensors")
    config = before / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_weights": "weights.safetensors"}))
    written = Conversion.of(before, "int8").write(tmp_path / "new")
    assert Checkpoint.open(written.folder).entries.keys() == Checkpoint.open(before).entries.keys()
