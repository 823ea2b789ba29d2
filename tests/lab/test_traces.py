"""Recorded routing on disk: what comes back is what went in, and any other file is refused by name."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.numpy import save_file

from fiddler.errors import ConfigError
from fiddler.lab.traces import FORMAT, VERSION, load, save
from fiddler.recording import Recording, RoutingTrace, visits

DEMO_TRACE = Path(__file__).parents[2] / "bench" / "traces" / "demo.safetensors"


def same(one: RoutingTrace, two: RoutingTrace) -> bool:
    def equal(a: Recording, b: Recording) -> bool:
        arrays_of = [(r.experts, r.weights, r.ahead) for r in (a, b)]
        alike = all(
            (x is None) == (y is None) and (x is None or (x.dtype == y.dtype and np.array_equal(x, y)))
            for x, y in zip(*arrays_of, strict=True)
        )
        return alike and (a.name, a.n_prompt) == (b.name, b.n_prompt)

    return (
        (one.model, one.n_experts) == (two.model, two.n_experts)
        and len(one.recordings) == len(two.recordings)
        and all(map(equal, one.recordings, two.recordings))
    )


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    n_experts = tuple(draw(st.lists(st.sampled_from([1, 8, 254, 255, 256, 300, 1 << 15]), min_size=1, max_size=4)))
    top_k, weighted, looked = draw(st.integers(1, 4)), draw(st.booleans()), draw(st.booleans())
    floats = st.floats(0, 8, width=16)

    def ids(n_tokens: int) -> Any:
        layers = [draw(arrays(np.int16, (n_tokens, top_k), elements=st.integers(-1, n - 1))) for n in n_experts]
        return np.stack(layers, axis=1)

    def recording() -> Recording:
        n_tokens = draw(st.integers(0, 5))
        shape = (n_tokens, len(n_experts), top_k)
        weights = draw(arrays(np.float16, shape, elements=floats)) if weighted else None
        n_prompt = draw(st.integers(0, n_tokens))
        return Recording(
            draw(st.text(max_size=5)), n_prompt, ids(n_tokens), weights, ids(n_tokens) if looked else None
        )

    recordings = tuple(recording() for _ in range(draw(st.integers(1, 3))))
    return RoutingTrace(draw(st.text(max_size=5)), n_experts, recordings)


@given(trace=traces())
def test_what_was_saved_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, trace: RoutingTrace) -> None:
    file = tmp_path_factory.getbasetemp() / "routing.safetensors"
    save(file, trace)

    assert same(load(file), trace)


def trace(n_experts: tuple[int, ...] = (4, 4, 4), **fields: Any) -> RoutingTrace:
    experts = np.arange(5 * 3 * 2, dtype=np.int16).reshape(5, 3, 2) % 4
    weights, ahead = np.full((5, 3, 2), 0.5, np.float16), experts.copy()
    one = Recording("one", 2, experts, weights, ahead)
    two = replace(one, name="two", n_prompt=3, experts=experts[:3], weights=weights[:3], ahead=ahead[:3])
    return replace(RoutingTrace("tiny", n_experts, (one, two)), **fields)


def test_ids_are_bytes_where_they_fit(tmp_path: Path) -> None:
    for most, dtype in ((255, "U8"), (256, "I16")):
        save(tmp_path / "routing", trace((4, 4, most)))
        with safe_open(tmp_path / "routing", framework="np") as file:
            assert file.get_slice("experts").get_dtype() == file.get_slice("ahead").get_dtype() == dtype
            assert file.get_slice("experts").get_shape() == [8, 3, 2]


def test_the_same_trace_is_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(tmp_path / name, trace())

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_narrower_sequences_are_filled_up_with_nobody(tmp_path: Path) -> None:
    narrow = Recording("narrow", 1, np.zeros((2, 3, 1), np.int16), np.ones((2, 3, 1), np.float16))
    wide = replace(trace().recordings[0], ahead=None)
    save(tmp_path / "routing", trace(recordings=(narrow, wide)))

    found, _ = load(tmp_path / "routing").recordings
    assert found.experts[0].tolist() == [[0, -1]] * 3
    assert found.weights is not None
    assert found.weights[0].tolist() == [[1.0, 0.0]] * 3


def test_nothing_recorded_can_be_kept_too(tmp_path: Path) -> None:
    save(tmp_path / "routing", trace(recordings=()))

    assert load(tmp_path / "routing").recordings == ()


@pytest.mark.parametrize(
    ("recording", "message"),
    [
        ({"ahead": None}, "1 of 2 sequences have ahead"),
        ({"weights": np.zeros((4, 3, 2), np.float16)}, "weights and experts differ in shape"),
        ({"n_prompt": 6}, "longer than its sequence"),
        ({"n_prompt": -1}, "longer than its sequence"),
        ({"experts": np.full((5, 3, 2), 4, np.int16)}, "experts names 4 among the 4 of layer 0"),
        ({"experts": np.full((5, 3, 2), -2, np.int16)}, "experts names -2"),
        ({"ahead": np.full((5, 3, 2), 7, np.int16)}, "ahead names 7"),
        ({"experts": np.zeros((5, 2, 2), np.int16)}, "not of a model of 3 layers"),
        ({"experts": np.zeros((5, 6), np.int16)}, "not of a model of 3 layers"),
    ],
)
def test_what_does_not_fit_is_not_written(tmp_path: Path, recording: dict[str, Any], message: str) -> None:
    file = tmp_path / "routing"
    file.write_text("before")
    one, two = trace().recordings

    with pytest.raises(ConfigError, match=message) as error:
        save(file, trace(recordings=(replace(one, **recording), two)))
    assert str(file) in str(error.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_names_may_be_any_text(tmp_path: Path) -> None:
    recording = replace(trace().recordings[0], name="\ud800 \u2028")
    save(tmp_path / "routing", trace(recordings=(recording,), model="模型"))

    found = load(tmp_path / "routing")
    assert (found.model, found.recordings[0].name) == ("模型", "\ud800 \u2028")
    with pytest.raises(ConfigError, match="cannot be written"):
        save(tmp_path / "routing", trace(model="\ud800"))


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "folder", tmp_path / "none" / "routing"):
        with pytest.raises(ConfigError, match="cannot be written"):
            save(file, trace())
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def rewritten(file: Path, tensors: dict[str, Any] | None = None, **metadata: str | None) -> None:
    """Write a good file with some tensors or metadata changed; `None` is left out."""
    save(file, trace())
    with safe_open(file, framework="np") as found:
        about = {**found.metadata(), **metadata}
        kept = {**{name: found.get_tensor(name) for name in found.keys()}, **(tensors or {})}  # noqa: SIM118
    about = {name: text for name, text in about.items() if text is not None}
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, file, about)


def test_the_header_says_what_the_file_is(tmp_path: Path) -> None:
    file = tmp_path / "routing"
    rewritten(file)
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])

    assert header["__metadata__"] == {
        "format": FORMAT,
        "version": VERSION,
        "model": "tiny",
        "n_experts": "[4, 4, 4]",
        "names": '["one", "two"]',
    }
    assert same(load(file), trace())


BYTES = np.zeros((8, 3, 2), np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": None}, "its format is None"),
        ({"format": "pt"}, "its format is 'pt'"),
        ({"version": "2"}, "its version is '2'"),
        ({"n_experts": None}, "n_experts is no JSON list"),
        ({"n_experts": "{}"}, "n_experts is no JSON list"),
        ({"n_experts": "[" * 100_000}, "n_experts is no JSON list"),
        ({"n_experts": "[]"}, "n_experts must be"),
        ({"n_experts": "[4, 4, true]"}, "n_experts must be"),
        ({"n_experts": "[4, 4, 1e999]"}, "n_experts must be"),
        ({"n_experts": "[4, 4]"}, "not of a model of 2 layers"),
        ({"n_experts": "[4, 4, 2]"}, "experts names 2 among the 2 of layer 2"),
        ({"names": "[1, 2]"}, "names must be"),
        ({"names": '["one"]'}, "not of 1 sequences"),
        ({"tensors": {"experts": None}}, "lacks a tensor 'experts'"),
        ({"tensors": {"offsets": None}}, "lacks a tensor 'offsets'"),
        ({"tensors": {"model.embed": BYTES}}, "has a tensor 'model.embed'"),
        ({"tensors": {"experts": BYTES.astype(np.int64)}}, "experts is I64, not U8 or I16"),
        ({"tensors": {"weights": BYTES.astype(np.float32)}}, "weights is F32, not F16"),
        ({"tensors": {"experts": BYTES[:, 0]}}, "not of a model of 3 layers"),
        ({"tensors": {"experts": BYTES[..., :0]}}, "not of a model of 3 layers"),
        ({"tensors": {"weights": BYTES[:5].astype(np.float16)}}, "weights of shape"),
        ({"tensors": {"experts": BYTES + np.uint8(9)}}, "experts names 9"),
        ({"tensors": {"experts": np.full((8, 3, 2), -3, np.int16)}}, "experts names -3"),
        ({"tensors": {"ahead": BYTES + np.uint8(4)}}, "ahead names 4"),
        ({"tensors": {"offsets": np.array([0, 8])}}, "not of 2 sequences"),
        ({"tensors": {"offsets": np.array([0, 5, 7])}}, "do not divide 8 tokens"),
        ({"tensors": {"offsets": np.array([1, 5, 8])}}, "do not divide 8 tokens"),
        ({"tensors": {"offsets": np.array([0, 9, 8])}}, "do not divide 8 tokens"),
        ({"tensors": {"offsets": np.array([0, -1, 8])}}, "do not divide 8 tokens"),
        ({"tensors": {"prompt_tokens": np.array([2])}}, "not of 2 sequences"),
        ({"tensors": {"prompt_tokens": np.array([2, 4])}}, "longer than its sequence"),
        ({"tensors": {"prompt_tokens": np.array([-1, 2])}}, "longer than its sequence"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "routing.safetensors"
    rewritten(file, **change)

    with pytest.raises(ConfigError, match=message) as error:
        load(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    "broken",
    [
        lambda whole: b"",
        lambda whole: b"PAR1" * 40,
        lambda whole: whole[:5],
        lambda whole: whole[:100],
        lambda whole: whole[:-1],
        lambda whole: whole + b"more",
        lambda whole: (1 << 60).to_bytes(8, "little") + whole[8:],
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, broken: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "routing.safetensors"
    save(file, trace())
    file.write_bytes(broken(file.read_bytes()))

    with pytest.raises(ConfigError, match=r"routing\.safetensors is no recorded routing"):
        load(file)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for file in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="is no recorded routing"):
            load(file)


def test_reading_needs_no_torch() -> None:
    code = "import sys, fiddler.lab.traces; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_demo_model_s_trace_is_of_six_domains() -> None:
    found = load(DEMO_TRACE)

    assert DEMO_TRACE.stat().st_size < 400_000
    assert found.n_experts == (16,) * 6
    domains = ("scripture", "jargon", "dictionary", "python", "manual", "chat")
    assert [r.name for r in found.recordings] == [f"{domain}/{i}" for domain in domains for i in range(4)]
    for recording in found.recordings:
        assert (recording.n_prompt, recording.experts.shape) == (64, (256, 6, 2))
        assert (recording.experts >= 0).all()
        assert recording.weights is not None
        np.testing.assert_allclose(recording.weights.sum(-1, dtype=np.float32), 1.0, atol=0.01)
        assert recording.ahead is not None
        assert (recording.ahead[:, 0] == -1).all()
        assert (recording.ahead[:, 1:] >= 0).all()
    assert sum(n for _, _, n in visits(found.recordings)) == 24 * 256 * 6
