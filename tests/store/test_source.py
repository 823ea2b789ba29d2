"""Where a model is looked for: a sentence for each thing that is none, and the hub as far as it is needed."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects

from fiddler import CheckpointError, UnsupportedModelError
from fiddler.config import EngineConfig
from fiddler.errors import ModelError
from fiddler.models.loaded import load
from fiddler.store.folder import INDEX, SINGLE, find_checkpoint
from tests.support.tiny import save_tiny

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 17\n"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


def adapter(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def renamed(folder: Path, name: str) -> Path:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / SINGLE).rename(folder / name)
    return folder


def written(file: Path, content: str = "") -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    return file


def moved(folder: Path, name: str) -> Path:
    shutil.copytree(folder, folder.parent / "above" / name)
    return folder.parent / "above"


def piped(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    return folder


FAULTS: dict[str, tuple[Any, type[ModelError], str]] = {
    "an empty folder": (
        lambda tiny: written(tiny / "no" / "x").unlink() or tiny / "no",
        CheckpointError,
        "is empty",
    ),
    "no gguf file": (lambda tiny: written(tiny / "m.Q4_K.gguf"), CheckpointError, "does not begin with GGUF"),
    "a gguf folder": (
        lambda tiny: written(tiny / "g" / "m.gguf").parent,
        CheckpointError,
        r"holds GGUF files, .*give a file: .*m\.gguf",
    ),
    "gguf beside a configuration": (lambda tiny: renamed(tiny, "m.gguf"), CheckpointError, "holds GGUF"),
    "an adapter": (lambda tiny: adapter(tiny / "lora"), UnsupportedModelError, r"adapter \(LoRA\) of some/base"),
    "an adapter beside a model": (adapter, UnsupportedModelError, r"adapter \(LoRA\) of some/base.*merge"),
    "a pointer": (
        lambda tiny: written(tiny / SINGLE, POINTER).parent,
        CheckpointError,
        "git-lfs pointer.*lfs pull",
    ),
    "a pointer for all": (
        lambda tiny: written(tiny / "config.json", POINTER).parent,
        CheckpointError,
        r"config\.json is a git-lfs",
    ),
    "a pointer for an index": (
        lambda tiny: written(renamed(tiny, "a.safetensors") / INDEX, POINTER).parent,
        CheckpointError,
        r"index\.json is a git-lfs",
    ),
    "a pointer for a tokenizer": (
        lambda tiny: written(tiny / "tokenizer.json", POINTER).parent,
        CheckpointError,
        r"tokenizer\.json is a git-lfs",
    ),
    "a file of weights": (lambda tiny: tiny / SINGLE, CheckpointError, "one file of a checkpoint; give its folder"),
    "a configuration": (lambda tiny: tiny / "config.json", CheckpointError, "one file of a checkpoint"),
    "a folder above": (lambda tiny: moved(tiny, "sub"), CheckpointError, "its sub folder has: give .*above/sub"),
    "a folder of the cache": (
        lambda tiny: moved(tiny, "snapshots/abc"),
        CheckpointError,
        "its sub folder has: give .*/snapshots/abc",
    ),
    "weights below": (
        lambda tiny: renamed(tiny, "sub/" + SINGLE),
        CheckpointError,
        "its sub folder does: give .*sub",
    ),
    "pickles": (lambda tiny: renamed(tiny, "pytorch_model.bin"), CheckpointError, "pickled weights"),
    "a pickle": (lambda tiny: written(tiny / "model.pt"), CheckpointError, "pickled weights"),
    "another maker's file": (
        lambda tiny: renamed(tiny, "consolidated.safetensors"),
        CheckpointError,
        f"holds consolidated.safetensors, but neither {SINGLE}",
    ),
    "another maker's format": (
        lambda tiny: written(tiny / "own" / "params.json").parent,
        UnsupportedModelError,
        "their maker's own format",
    ),
    "a zip": (lambda tiny: written(tiny / "model.zip"), CheckpointError, "is an archive; unpack it"),
    "a tar": (lambda tiny: written(tiny / "model.tar.gz"), CheckpointError, "is an archive; unpack it"),
    "some file": (lambda tiny: written(tiny / "notes"), CheckpointError, "is a file, not a folder"),
    "nothing": (lambda tiny: tiny / "none", CheckpointError, "neither a checkpoint folder nor a hub id"),
    "a pipe for a configuration": (lambda t: piped(t, "config.json"), CheckpointError, "not a regular file"),
    "a pipe for weights": (lambda t: piped(t, SINGLE), CheckpointError, "not a regular file"),
    "no configuration": (
        lambda tiny: (tiny / "config.json").unlink() or tiny,
        CheckpointError,
        r"config\.json is missing",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_holds_no_checkpoint_is_told_apart(tiny: Path, fault: str) -> None:
    make, kind, message = FAULTS[fault]
    place = make(tiny)
    for given in (place, str(place)):
        with pytest.raises(kind, match=message):
            find_checkpoint(given)


@pytest.mark.parametrize(
    "model", ["", "a b/c", "a//b", "https://a.b/c/d", "~nobody-here/x", "a\0b", "x" * 9999, 5, b"x"]
)
def test_what_is_no_name(model: Any) -> None:
    with pytest.raises(CheckpointError):
        find_checkpoint(model)


def test_a_command_says_it_before_torch_is_imported(tmp_path: Path) -> None:
    without = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None"
    code = f"{without}\nfrom fiddler.cli import app; app()"
    for command in (["generate", "-p", "x"], ["chat"], ["inspect"], ["calibrate"]):
        ran = subprocess.run(
            [sys.executable, "-c", code, *command, "-m", str(written(tmp_path / "model.gguf"))],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert (ran.returncode, ran.stdout) == (1, "")
        assert "does not begin with GGUF" in ran.stderr
        assert "Traceback" not in ran.stderr


@dataclass
class Hub:
    """A hub of one model, whose cache starts empty."""

    there: Path
    cache: Path
    revisions: tuple[str | None, ...] = (None, "main", "v1")
    online: bool = True
    asked: list[str] = field(default_factory=list)

    def snapshot_download(
        self,
        name: str,
        *,
        revision: str | None = None,
        allow_patterns: list[str] | None = None,
        ignore_patterns: list[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        folder = self.cache / (revision or "main")
        if local_files_only or not self.online:
            if not folder.is_dir() or not local_files_only:
                raise LocalEntryNotFoundError("nothing cached")
            return str(folder)
        response: Any = None
        if name != "somebody/tiny":
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404", response=response)
        if revision not in self.revisions:
            raise RevisionNotFoundError.__new__(RevisionNotFoundError, "404", response=response)
        files = [str(f.relative_to(self.there)) for f in self.there.rglob("*") if f.is_file()]
        wanted = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for file in wanted:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.there / file, folder / file)
            self.asked.append(file)
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def got(self) -> set[str]:
        """Return the large files that were downloaded."""
        return {name for name in self.asked if not name.endswith((".json", ".jinja"))}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(save_tiny(tmp_path / "there"), tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


OTHERS = (
    *(
        "original/consolidated.safetensors",
        "original/params.json",
        "consolidated.safetensors",
        "model.fp16.safetensors",
    ),
    *(
        "pytorch_model.bin",
        "consolidated.00.pth",
        "tiny-Q4.gguf",
        "onnx/model.onnx",
        "adapter/adapter_model.safetensors",
    ),
    *("README.md", "training.tar", "figures/a.png"),
)


class TestHub:
    def with_others(self, hub: Hub) -> None:
        for name in OTHERS:
            (hub.there / name).parent.mkdir(exist_ok=True)
            (hub.there / name).write_bytes(b"large")

    def test_no_more_is_downloaded_than_is_needed(self, hub: Hub) -> None:
        self.with_others(hub)
        folder = find_checkpoint("somebody/tiny")
        assert hub.got() == {SINGLE}
        assert load(folder, EngineConfig()).text.tokenizer is not None
        assert not (folder / "original").exists()

    def test_shards_are_those_of_the_index(self, hub: Hub) -> None:
        shutil.rmtree(hub.there)
        save_tiny(hub.there, max_shard_size="100KB")
        self.with_others(hub)
        (hub.there / "model-00001-of-00099.safetensors").write_bytes(b"of another upload")
        find_checkpoint("somebody/tiny")
        index = json.loads((hub.there / INDEX).read_text())
        assert hub.got() == set(index["weight_map"].values())

    def test_one_file_wins_over_an_index(self, hub: Hub) -> None:
        (hub.there / INDEX).write_text('{"weight_map": {"a": "model-1.safetensors"}}')
        (hub.there / "model-1.safetensors").write_bytes(b"large")
        find_checkpoint("somebody/tiny")
        assert hub.got() == {SINGLE}

    def test_the_file_that_the_configuration_names(self, hub: Hub) -> None:
        config = json.loads((hub.there / "config.json").read_text())
        (hub.there / "config.json").write_text(json.dumps(config | {"transformers_weights": "x.safetensors"}))
        shutil.copy(hub.there / SINGLE, hub.there / "x.safetensors")
        find_checkpoint("somebody/tiny")
        assert hub.got() == {"x.safetensors"}

    def test_files_of_tokenizers_and_templates(self, hub: Hub) -> None:
        names = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "qwen.tiktoken", "chat_template.json")
        names += ("chat_template.jinja", "additional_chat_templates/tools.jinja", "modeling.py")
        for name in names:
            written(hub.there / name)
        folder = find_checkpoint("somebody/tiny")
        assert all((folder / name).is_file() for name in names)

    @pytest.mark.parametrize("kept", [["config.json"], ["config.json", INDEX, "model-00001-of-00007.safetensors"]])
    def test_what_is_cached_in_part_is_downloaded_further(self, hub: Hub, kept: list[str]) -> None:
        shutil.rmtree(hub.there)
        save_tiny(hub.there, max_shard_size="50KB")
        (hub.cache / "main").mkdir(parents=True)
        for name in kept:
            found = next(iter(sorted(hub.there.glob(name.replace("00007", "*")))))
            shutil.copy(found, hub.cache / "main" / found.name)
        folder = find_checkpoint("somebody/tiny")
        assert load(folder, EngineConfig()).n_experts == (8, 8, 8)

    def test_what_is_cached_whole_is_not_asked_for(self, hub: Hub) -> None:
        folder = find_checkpoint("somebody/tiny")
        hub.asked.clear()
        hub.online = False
        assert find_checkpoint("somebody/tiny") == folder
        assert find_checkpoint("somebody/tiny", download=False) == folder
        assert hub.asked == []

    def test_a_part_that_cannot_be_completed_is_named(self, hub: Hub) -> None:
        (hub.cache / "main").mkdir(parents=True)
        shutil.copy(hub.there / "config.json", hub.cache / "main")
        hub.online = False
        with pytest.raises(
            CheckpointError, match=r"in part \(.* holds neither .*\); the rest cannot be downloaded"
        ):
            find_checkpoint("somebody/tiny")
        with pytest.raises(CheckpointError, match=r"neither a folder nor whole in the hub cache: .* holds neither"):
            find_checkpoint("somebody/tiny", download=False)

    def test_a_revision(self, hub: Hub) -> None:
        assert find_checkpoint("somebody/tiny@v1") == hub.cache / "v1"
        assert find_checkpoint("somebody/tiny") == hub.cache / "main"
        with pytest.raises(CheckpointError, match="somebody/tiny@v2: the model has no such branch, tag or commit"):
            find_checkpoint("somebody/tiny@v2")

    def test_a_folder_wins_over_a_revision(self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save_tiny(tmp_path / "somebody" / "tiny@v1")
        monkeypatch.chdir(tmp_path)
        assert find_checkpoint("somebody/tiny@v1") == Path("somebody/tiny@v1")
        assert hub.asked == []

    def test_a_mistyped_id(self, hub: Hub) -> None:
        with pytest.raises(CheckpointError, match=r"somebody/tini is no folder here, .* check the spelling"):
            find_checkpoint("somebody/tini")
