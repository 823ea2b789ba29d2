"""Which of a folder's files are the checkpoint: transformers' own choice, for all parts of a model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fiddler.config import EngineConfig
from fiddler.models import seam
from fiddler.models.loaded import load
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.folder import INDEX, SINGLE
from tests.support.tiny import save_tiny


class TestWhichFiles:
    """The files that transformers reads, for all parts of a model."""

    def both(self, folder: Path, *, seed: int) -> Path:
        """Save a checkpoint as one file, and beside it another one as shards."""
        save_tiny(folder, seed=seed)
        sharded = save_tiny(folder / "other", seed=seed + 1, max_shard_size="100KB")
        for file in (*sharded.glob("*.safetensors"), sharded / INDEX):
            file.rename(folder / file.name)
        assert (folder / SINGLE).is_file()
        assert (folder / INDEX).is_file()
        return folder

    @pytest.mark.parametrize("named", [None, SINGLE, INDEX])
    def test_one_file_beside_shards(self, tmp_path: Path, named: str | None) -> None:
        folder = self.both(tmp_path, seed=3)
        if named is not None:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": named}))
        assert_as_transformers(folder)
        assert set(Checkpoint.open(folder).files) == (
            set(folder.glob("model-*")) if named == INDEX else {folder / SINGLE}
        )

    def test_a_tensor_in_two_shards_is_the_later_ones(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path, max_shard_size="100KB")
        shards = sorted(folder.glob("*.safetensors"))
        first, last = load_file(shards[0]), load_file(shards[-1])
        doubled = next(iter(first))
        last[doubled] = first[doubled] + 1
        save_file(last, shards[-1], metadata={"format": "pt"})
        assert_as_transformers(folder)
        assert torch.equal(Checkpoint.open(folder).tensor(doubled), last[doubled])

    def test_tensors_that_the_index_forgets_are_read(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path, max_shard_size="100KB")
        index = json.loads((folder / INDEX).read_text())
        one_of_each = {shard: name for name, shard in index["weight_map"].items()}
        index["weight_map"] = {name: shard for shard, name in one_of_each.items()}
        (folder / INDEX).write_text(json.dumps(index))
        assert_as_transformers(folder)

    def test_stray_files_are_not_read(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path, max_shard_size="100KB")
        for name in ("consolidated", "model-00001-of-00001", "adapter_model", "model.fp16"):
            (folder / f"{name}.safetensors").write_bytes(b"nothing")
        assert_as_transformers(folder)

    def test_links_of_the_hubs_cache(self, tmp_path: Path) -> None:
        blobs = save_tiny(tmp_path / "blobs", max_shard_size="100KB")
        snapshot = tmp_path / "snapshots" / "main"
        snapshot.mkdir(parents=True)
        for file in tuple(blobs.iterdir()):
            file.rename(blobs / f"sha-{file.name}")
            (snapshot / file.name).symlink_to(f"../../blobs/sha-{file.name}")
        assert_as_transformers(snapshot)


def assert_as_transformers(folder: Path) -> None:
    """Every weight of the dense part and of every expert is transformers' own."""
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ours = load(folder, EngineConfig())
    dense = ours.model.state_dict()
    assert dense
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in dense.items())
    for layer, module in enumerate(seam.find_experts(theirs).values()):
        for expert in range(ours.n_experts[layer]):
            weights, due = ours.weights(layer, expert), seam.module_weights(module, expert)
            assert torch.equal(torch.cat(weights.up), due.up[0])
            assert torch.equal(weights.down, due.down)
