"""Every peer runs what it is given on the weights it is given; no time is asserted."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fiddler
from bench import checkpoints
from bench.peers import accelerate_disk, llama_cpp, transformers_experts
from bench.peers.known import PEERS, open_peer
from bench.peers.peer import Peer
from bench.workload import Run, UnavailableError, Workload
from tools import synthesize

Opened = Callable[[str, Path], Peer]

TINY = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 128}
TINY_EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2},
    "mixtral-8x7b": {"intermediate_size": 48, "num_local_experts": 4},
}
MODELS = (*TINY_EXPERTS, "demo")
OF_TRANSFORMERS = ("eager", "batched_mm", "grouped_mm", "accelerate-disk")
FOREVER = 1000.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {"demo": fiddler.DEMO}
    for name, experts in TINY_EXPERTS.items():
        config = synthesize.config_of(f"{name}:layers=2", **TINY, **experts)
        made[name] = synthesize.write(config, tmp_path_factory.mktemp("models") / name, shard_bytes=50_000)
    return made


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float32, where rounding decides nothing."""
    folder = tmp_path_factory.mktemp("exact") / "demo"
    AutoModelForCausalLM.from_pretrained(fiddler.DEMO, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is written beside the user's own files; tests share what they write."""
    folder = tmp_path_factory.getbasetemp() / "bench"
    monkeypatch.setattr(checkpoints, "CACHE", folder)
    return folder


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Open peers, and close them when the test ends."""
    kept: list[Peer] = []

    def opening(name: str, folder: Path) -> Peer:
        if name == "llama.cpp":
            pytest.importorskip("llama_cpp", reason="it compiles for minutes, so only the extra `peers` has it")
        kept.append(open_peer(name, folder, threads=1))
        return kept[-1]

    yield opening
    for peer in kept:
        peer.close()


def run(peer: Peer, *, patience_s: float = FOREVER, **changes: int) -> Run:
    counts = {"n_sequences": 2, "n_input": 5, "n_output": 4, "n_vocabulary": 128, **changes}
    workload = Workload(**counts)
    made = Workload(workload.n_sequences, workload.n_output, 1, 128).prompts(seed=2)
    return peer.run(workload, workload.prompts(seed=1), made, patience_s)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", PEERS)
def test_every_peer_makes_what_it_is_asked_for(
    name: str, model: str, folders: dict[str, Path], opened: Opened
) -> None:
    peer = opened(name, folders[model])
    for n_sequences in (2, 3, 2):
        done = run(peer, n_sequences=n_sequences)
        assert (done.n_sequences, done.n_output) == (n_sequences, 4)
        assert [len(tokens) for tokens in done.tokens] == [4] * n_sequences
        assert done.first_token_s is not None
        assert min(done.first_token_s, done.decode_s) > 0


@pytest.mark.parametrize("name", PEERS)
def test_decoding_ends_with_the_patience_but_not_before_its_first_step(
    name: str, folders: dict[str, Path], opened: Opened
) -> None:
    peer = opened(name, folders["qwen3-30b-a3b"])
    assert run(peer, patience_s=0.0).n_output == 2
    alone = run(peer, n_output=1)
    assert (alone.n_output, alone.decode_s) == (1, 0.0)


@pytest.mark.parametrize("name", [*OF_TRANSFORMERS[1:], "llama.cpp"])
def test_all_pick_the_same_tokens(name: str, exact: Path, opened: Opened) -> None:
    """The prompts are longer than llama.cpp's batches, and begin and end in the middle of them."""
    shape = {"n_sequences": 3, "n_input": 200, "n_output": 3}
    reference = run(opened("eager", exact), **shape).tokens
    peer = opened(name, exact)
    assert run(peer, **shape).tokens == reference
    assert run(peer, **shape).tokens == reference, "the first run was not forgotten"


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_beams(name: str, exact: Path, opened: Opened) -> None:
    peer = opened(name, exact)
    done = run(peer, n_beams=3, n_output=6)
    assert done.first_token_s is not None
    assert min(done.first_token_s, done.decode_s) > 0
    model: Any = AutoModelForCausalLM.from_pretrained(exact)
    ids = torch.tensor(Workload(2, 5, 6, 128).prompts(seed=1))
    searched = model.generate(ids, num_beams=3, do_sample=False, max_new_tokens=6, eos_token_id=None)
    assert [list(tokens) for tokens in done.tokens] == searched[:, 5:].tolist()
    hasty = run(peer, n_beams=3, n_output=6, patience_s=0.0)
    assert [len(tokens) for tokens in hasty.tokens] == [hasty.n_output] * 2 == [2, 2]
    assert run(peer, n_beams=3, n_output=1).decode_s == 0.0


def test_llama_cpp_has_no_beams(folders: dict[str, Path], opened: Opened) -> None:
    with pytest.raises(UnavailableError, match="beam search"):
        run(opened("llama.cpp", folders["demo"]), n_beams=2)


def test_experts_implementations_share_one_model(folders: dict[str, Path], opened: Opened) -> None:
    eager, grouped = (opened(name, folders["demo"]) for name in ("eager", "grouped_mm"))
    assert len(transformers_experts._models) == 1
    eager.close()
    assert run(grouped).n_output == 4
    grouped.close()
    assert not transformers_experts._models


def test_gathering_where_memory_has_room(
    folders: dict[str, Path], opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = opened("batched_mm", folders["demo"])
    model: Any = transformers_experts._models[folders["demo"].resolve()]
    row = transformers_experts.row_bytes(model)
    assert row == 2 * 3 * 128 * 128 * 2  # two experts of three matrices in bfloat16
    monkeypatch.setattr(transformers_experts, "free_bytes", lambda: 8 * row)
    assert run(peer).first_token_s is None  # another implementation had to read the prompt
    assert run(peer, n_input=2).first_token_s is not None
    for too_much in ({"n_sequences": 5}, {"n_beams": 2}):
        with pytest.raises(UnavailableError, match="gather"):
            run(peer, **too_much)


@pytest.mark.parametrize(
    ("name", "module"),
    [("eager", transformers_experts), ("accelerate-disk", accelerate_disk), ("llama.cpp", llama_cpp)],
)
def test_a_peer_says_that_memory_has_no_room(
    name: str, module: Any, folders: dict[str, Path], opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda: 1000)
    with pytest.raises(UnavailableError, match="GB of memory"):
        opened(name, folders["demo"])


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("accelerate-disk", "accelerate", "accelerate"),
        ("llama.cpp", "llama_cpp", "llama-cpp-python"),
    ],
)
def test_a_peer_says_what_to_install(
    name: str, module: str, package: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnavailableError, match=f"pip install {package}"):
        open_peer(name, folders["demo"], threads=1)


def test_an_unknown_peer_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"no_such.*llama\.cpp"):
        open_peer("no_such", folders["demo"], threads=1)


def test_what_accelerate_wrote_is_removed(folders: dict[str, Path], opened: Opened, cache: Path) -> None:
    peer = opened("accelerate-disk", folders["demo"])
    assert list(cache.glob("offload-*/*.safetensors"))
    peer.close()
    assert not list(cache.glob("offload-*"))
