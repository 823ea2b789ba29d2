"""The mapped store: every way experts lie in a file, seen as `[out, in]` matrices without a copy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteMoeConfig, PreTrainedModel

from fiddler.config import EngineConfig
from fiddler.errors import CheckpointError
from fiddler.models import seam
from fiddler.models.loaded import load
from fiddler.store import mapped
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.folder import INDEX, SINGLE
from fiddler.store.mapped import Every, ExpertParts, Layout, MappedStore, Select, Transpose, View
from fiddler.types import ExpertWeights
from tests.support.tiny import N_LAYERS, save_tiny

N, H, I = 3, 8, 6  # noqa: E741  # the design's letters
GATE, UP = torch.rand(N, I, H), torch.rand(N, I, H)
DOWN = torch.rand(N, H, I)
FUSED = torch.cat([GATE, UP], dim=1)  # [N, 2I, H]
GATE_BIAS, UP_BIAS, DOWN_BIAS = torch.rand(N, I), torch.rand(N, I), torch.rand(N, H)
INTERLEAVED = torch.stack([GATE, UP], dim=2).flatten(1, 2)  # [N, 2I, H], rows gate0, up0, gate1, …


def store(folder: Path, tensors: dict[str, Tensor], *parts: ExpertParts, **options: Any) -> MappedStore:
    """Return a store of one layer over a file of `tensors`."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE)
    return MappedStore(Checkpoint.open(folder), Layout((parts,)), options.pop("dtype", torch.float32), **options)


@pytest.fixture(autouse=True)
def _any_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views are what is tested here, on a machine that would copy what lies off a boundary too."""
    monkeypatch.setattr(mapped, "_bits_hang_on_alignment", lambda: False)


def tensors_of(weights: ExpertWeights) -> list[Tensor]:
    down_bias = [] if weights.down_bias is None else [weights.down_bias]
    return [*weights.up, weights.down, *weights.up_bias, *down_bias]


def is_view_of_file(tensor: Tensor, store: MappedStore) -> bool:
    starts = {mapping.bytes.data_ptr() for mapping in store.checkpoint._mappings.values()}
    return tensor.untyped_storage().data_ptr() in starts


class TestLayouts:
    def test_gate_and_up_apart_stay_two_views(self, tmp_path: Path) -> None:
        tensors = {"a.w1": GATE[0], "b.w2": DOWN[0], "c.w3": UP[0]}
        made = store(tmp_path, tensors, ExpertParts((View("a.w1"), View("c.w3")), View("b.w2")))
        weights = made.weights(0, 0)
        assert [torch.equal(*pair) for pair in zip(weights.up, (GATE[0], UP[0]), strict=True)] == [True, True]
        assert torch.equal(weights.down, DOWN[0])
        assert all(is_view_of_file(t, made) for t in tensors_of(weights))

    def test_gate_and_up_back_to_back_become_one_view(self, tmp_path: Path) -> None:
        tensors = {"a.down": DOWN[0], "b.gate": GATE[0], "c.up": UP[0]}
        made = store(tmp_path, tensors, ExpertParts((View("b.gate"), View("c.up")), View("a.down")))
        (up,) = made.weights(0, 0).up
        assert torch.equal(up, FUSED[0])
        assert up.data_ptr() == made.checkpoint.tensor("b.gate").data_ptr()

    @pytest.mark.parametrize("expert", range(N))
    def test_fused_experts_are_selected(self, tmp_path: Path, expert: int) -> None:
        parts = [ExpertParts((View("up", (Select(e),)),), View("down", (Select(e),))) for e in range(N)]
        made = store(tmp_path, {"up": FUSED, "down": DOWN}, *parts)
        weights = made.weights(0, expert)
        assert torch.equal(weights.up[0], FUSED[expert])
        assert torch.equal(weights.down, DOWN[expert])
        assert weights.up[0].data_ptr() == made.checkpoint.tensor("up").data_ptr() + expert * FUSED[0].nbytes

    def test_transposed_experts_are_turned_by_view(self, tmp_path: Path) -> None:
        tensors = {"up": FUSED.mT, "down": DOWN.mT}
        steps = (Select(1), Transpose())
        made = store(tmp_path, tensors, ExpertParts((View("up", steps),), View("down", steps)))
        weights = made.weights(0, 0)
        assert torch.equal(weights.up[0], FUSED[1])
        assert torch.equal(weights.down, DOWN[1])
        assert all(is_view_of_file(t, made) for t in tensors_of(weights))

    @pytest.mark.parametrize("transposed", [False, True])
    def test_interleaved_halves_are_taken_apart_by_view(self, tmp_path: Path, transposed: bool) -> None:
        steps = [(Select(2), Every(1 if transposed else 0, start)) for start in (0, 1)]
        turn = (Transpose(),) if transposed else ()
        up = tuple(View("up", (*s, *turn)) for s in steps)
        tensors = {"up": INTERLEAVED.mT if transposed else INTERLEAVED, "down": DOWN}
        made = store(tmp_path, tensors, ExpertParts(up, View("down", (Select(2),))))
        weights = made.weights(0, 0)
        assert torch.equal(weights.up[0], GATE[2])
        assert torch.equal(weights.up[1], UP[2])
        assert all(is_view_of_file(t, made) for t in tensors_of(weights))

    def test_parts_may_lie_in_different_shards(self, tmp_path: Path) -> None:
        save_file({"gate": GATE[0]}, tmp_path / "one.safetensors")
        save_file({"up": UP[0], "down": DOWN[0]}, tmp_path / "two.safetensors")
        (tmp_path / INDEX).write_text(
            '{"weight_map": {"gate": "one.safetensors", "up": "two.safetensors", "down": "two.safetensors"}}'
        )
        parts = ExpertParts((View("gate"), View("up")), View("down"))
        made = MappedStore(Checkpoint.open(tmp_path), Layout(((parts,),)), torch.float32)
        weights = made.weights(0, 0)
        assert torch.equal(torch.cat(weights.up), FUSED[0])
        assert all(is_view_of_file(t, made) for t in tensors_of(weights))

    def test_missing_tensor_fails_when_its_expert_is_asked_for(self, tmp_path: Path) -> None:
        whole, broken = ExpertParts((View("up"),), View("down")), ExpertParts((View("up"),), View("lost"))
        made = store(tmp_path, {"up": FUSED[0], "down": DOWN[0]}, whole, broken)
        assert torch.equal(made.weights(0, 0).down, DOWN[0])
        with pytest.raises(CheckpointError, match="'lost' is not in"):
            made.weights(0, 1)

    def test_layout_counts_experts_by_layer(self) -> None:
        part = ExpertParts((View("up"),), View("down"))
        assert Layout(((part,) * 3, (part,))).n_experts == (3, 1)


class TestBiases:
    BIASES = {"up_bias": GATE_BIAS[0], "v_bias": UP_BIAS[0], "down_bias": DOWN_BIAS[0]}  # noqa: RUF012
    BOTH = torch.cat([GATE_BIAS[0], UP_BIAS[0]])

    def test_one_bias_beside_one_matrix_is_a_view(self, tmp_path: Path) -> None:
        tensors = {"up": FUSED[0], "down": DOWN[0], "b": self.BOTH, "c": DOWN_BIAS[0]}
        parts = ExpertParts((View("up"),), View("down"), (View("b"),), View("c"))
        made = store(tmp_path, tensors, parts)
        weights = made.weights(0, 0)
        assert torch.equal(weights.up_bias[0], self.BOTH)
        assert weights.down_bias is not None
        assert torch.equal(weights.down_bias, DOWN_BIAS[0])
        assert all(is_view_of_file(t, made) for t in tensors_of(weights))

    def test_two_biases_are_joined_where_their_matrices_are(self, tmp_path: Path) -> None:
        tensors = {"a.gate": GATE[0], "b.up": UP[0], "down": DOWN[0], **self.BIASES}
        up_bias = (View("up_bias"), View("v_bias"))
        parts = ExpertParts((View("a.gate"), View("b.up")), View("down"), up_bias, View("down_bias"))
        weights = store(tmp_path, tensors, parts).weights(0, 0)
        assert len(weights.up) == len(weights.up_bias) == 1
        assert torch.equal(weights.up_bias[0], self.BOTH)

    def test_one_bias_is_split_where_the_matrices_are_apart(self, tmp_path: Path) -> None:
        tensors = {"z.gate": GATE[0], "b.up": UP[0], "down": DOWN[0], "bias": self.BOTH}
        parts = ExpertParts((View("z.gate"), View("b.up")), View("down"), (View("bias"),))
        weights = store(tmp_path, tensors, parts).weights(0, 0)
        assert len(weights.up) == 2
        assert torch.equal(weights.up_bias[0], GATE_BIAS[0])
        assert torch.equal(weights.up_bias[1], UP_BIAS[0])
        assert weights.down_bias is None


class TestDtypes:
    PARTS = ExpertParts((View("up"),), View("down"))

    def test_the_files_own_is_never_converted(self, tmp_path: Path) -> None:
        tensors = {"up": FUSED[0].bfloat16(), "down": DOWN[0].bfloat16()}
        made = store(tmp_path, tensors, self.PARTS, dtype=torch.bfloat16)
        assert all(is_view_of_file(t, made) for t in tensors_of(made.weights(0, 0)))

    def test_another_is_converted_once_and_kept(self, tmp_path: Path) -> None:
        made = store(tmp_path, {"up": FUSED[0], "down": DOWN[0]}, self.PARTS, dtype=torch.bfloat16)
        weights = made.weights(0, 0)
        assert torch.equal(weights.up[0], FUSED[0].bfloat16())
        assert torch.equal(weights.down, DOWN[0].bfloat16())
        assert not any(is_view_of_file(t, made) for t in tensors_of(weights))
        assert made.weights(0, 0) is weights

    def test_nbytes_counts_every_part(self, tmp_path: Path) -> None:
        tensors = {"up": FUSED[0], "down": DOWN[0], "b": torch.rand(2 * I), "c": DOWN_BIAS[0]}
        parts = ExpertParts((View("up"),), View("down"), (View("b"),), View("c"))
        weights = store(tmp_path, tensors, parts, dtype=torch.bfloat16).weights(0, 0)
        assert weights.nbytes == 2 * (2 * I * H + H * I + 2 * I + H)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that transformers saved, and the model transformers loads from it."""

    folder: Path
    model: PreTrainedModel


def save(kind: str, folder: Path, max_shard_size: str, dtype: torch.dtype) -> Path:
    if kind != "granitemoe":
        return save_tiny(folder, kind, max_shard_size=max_shard_size, dtype=dtype)
    config = GraniteMoeConfig(
        vocab_size=99,
        hidden_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture(
    scope="module",
    params=[
        (kind, size) for kind in ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe") for size in ("50GB", "100KB")
    ],
    ids="-".join,
)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    kind, max_shard_size = request.param
    folder = save(kind, tmp_path_factory.mktemp(kind), max_shard_size, torch.bfloat16)
    assert (folder / INDEX).is_file() == (max_shard_size == "100KB")
    return Saved(folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))


class TestSavedByTransformers:
    def test_every_weight_equals_the_loaded_models(self, saved: Saved) -> None:
        ours = load(saved.folder, EngineConfig())
        theirs = seam.find_experts(saved.model)
        assert list(ours.experts) == list(theirs)
        for layer, module in enumerate(theirs.values()):
            assert ours.n_experts[layer] == module.down_proj.shape[0]
            for expert in range(ours.n_experts[layer]):
                assert_same(ours.weights(layer, expert), seam.module_weights(module, expert))

    def test_no_weight_is_copied(self, saved: Saved) -> None:
        ours = load(saved.folder, EngineConfig())
        made: Any = ours.weights.__self__  # type: ignore[attr-defined]
        for layer, n_experts in enumerate(ours.n_experts):
            for expert in range(n_experts):
                assert all(is_view_of_file(t, made) for t in tensors_of(ours.weights(layer, expert)))

    def test_weights_in_another_dtype_are_the_converted_ones(self, saved: Saved) -> None:
        ours = load(saved.folder, EngineConfig(dtype="float32"))
        module = next(iter(seam.find_experts(saved.model).values()))
        expected = seam.module_weights(module, 1)
        weights = ours.weights(0, 1)
        assert weights.down.dtype == torch.float32
        assert torch.equal(weights.down, expected.down.float())
        assert torch.equal(torch.cat(weights.up), expected.up[0].float())


def assert_same(ours: ExpertWeights, theirs: ExpertWeights) -> None:
    assert torch.equal(torch.cat(ours.up), torch.cat(theirs.up))
    assert torch.equal(ours.down, theirs.down)
    assert (len(ours.up_bias), ours.down_bias is None) == (len(theirs.up_bias), theirs.down_bias is None)
    if theirs.down_bias is not None:
        assert ours.down_bias is not None
        assert torch.equal(torch.cat(ours.up_bias), torch.cat(theirs.up_bias))
        assert torch.equal(ours.down_bias, theirs.down_bias)


class TestBoundaries:
    """Where bits hang on it, a float32 matrix off a boundary is copied, and nothing else is."""

    @pytest.fixture(params=[True, False], ids=["hang", "do not"])
    def hang(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
        monkeypatch.setattr(mapped, "_bits_hang_on_alignment", lambda: request.param)
        return bool(request.param)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("pad", [0, 1, 4])
    def test_copies(self, hang: bool, dtype: torch.dtype, pad: int) -> None:
        room = torch.zeros(128 + 16, dtype=dtype)
        start = -room.data_ptr() // room.itemsize % 16
        found = room[start + pad :][:64].view(8, 8)
        off = found.data_ptr() % mapped.BOUNDARY != 0
        for tensor in (found, found.t()):
            kept = mapped.aligned(tensor)
            copies = hang and off and dtype == torch.float32
            assert (kept is tensor) == (not copies)
            assert not copies or (kept.stride() == tensor.stride() and kept.data_ptr() % mapped.BOUNDARY == 0)
        assert mapped.aligned(found[:, ::2]).data_ptr() == found.data_ptr()
