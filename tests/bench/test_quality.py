"""The guard of quality: it holds on a few tokens, notices what is broken, and held when the results were made."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.nn import functional as F

import bench
from bench import quality
from bench import quality_paths as forced
from bench.quality import Outcome, broken
from bench.quality_paths import PATHS
from fiddler.config import EngineConfig
from fiddler.engine.assembly import Rig
from fiddler.models.loaded import ServableModel, load

N_TOKENS = 48
SOME = ("cpu", "cpu, packed", "cpu, float32", "virtual, a quarter resident", "transformers eager, float32")
Spoil = Callable[[ServableModel], ServableModel]


def measure(*names: str) -> dict[str, Outcome]:
    return quality.measure({name: PATHS[name] for name in names}, *quality.texts_of(N_TOKENS))


def spoilt(monkeypatch: pytest.MonkeyPatch, spoil: Spoil, **options: Any) -> None:
    """Let loading with these options give another model."""

    def loading(model: Path, config: EngineConfig) -> ServableModel:
        loaded = load(model, config)
        return spoil(loaded) if all(getattr(config, name) == value for name, value in options.items()) else loaded

    monkeypatch.setattr(forced, "load", loading)


def other_weight(loaded: ServableModel) -> ServableModel:
    changed = loaded.weights(3, 5).down.clone()
    changed[7, 9] += 1.0
    return replace(
        loaded,
        weights=lambda layer, expert: (
            replace(loaded.weights(layer, expert), down=changed)
            if (layer, expert) == (3, 5)
            else loaded.weights(layer, expert)
        ),
    )


def other_formula(loaded: ServableModel) -> ServableModel:
    return replace(loaded, formulas=tuple(replace(formula, activation=F.relu) for formula in loaded.formulas))


def test_promises_hold_on_few_tokens() -> None:
    found = measure(*SOME)
    assert broken(found) == []
    n_bytes = quality.texts_of(N_TOKENS)[1]
    for one in found.values():
        assert one.n_tokens == len(quality.MODULES) * (N_TOKENS - 1)
        assert one.perplexity == pytest.approx(2.0 ** (one.bits_per_byte * n_bytes / one.n_tokens))
    assert found["cpu, packed"].against_cpu == 0.0
    assert found["cpu, float32"].n_different > 0


def test_simulated_paths_run_experts_from_slots_and_copy_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    machines: list[Rig] = []
    made = forced._machine
    monkeypatch.setattr(forced, "_machine", lambda *given: machines.append(made(*given)) or machines[-1])
    measure("cpu", "virtual, a quarter resident")
    decided = machines[1].scheduler
    assert min(decided.counters.n_hits, decided.counters.n_cpu, decided.prefetched.n_issued) > 0


def test_a_chunk_s_last_token_is_compared_with_the_same_token() -> None:
    names = ("cpu", "cpu, float32", "cpu, float32, in chunks")
    found = measure(*names)
    assert broken(found) == []
    assert found[names[2]].n_tokens == len(quality.MODULES) * ((N_TOKENS - 1) // PATHS[names[2]].chunk)


def test_one_other_weight_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spoilt(monkeypatch, other_weight, store="packed")
    monkeypatch.setattr(quality, "PATHS", {name: PATHS[name] for name in SOME[:2]})
    file = tmp_path / "quality.json"
    with pytest.raises(SystemExit, match=r"cpu, packed: promises the bits of 'cpu'; \d+ of 376 tokens differ"):
        quality.main(["--tokens", str(N_TOKENS), "--json", str(file)])
    assert json.loads(file.read_text())["paths"]["cpu, packed"]["n_different"]


def test_another_formula_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt(monkeypatch, other_formula, dtype="float32")
    (complaint,) = broken(measure("cpu", "cpu, float32"))
    assert "cpu, float32: changes the perplexity of 'cpu'" in complaint


@pytest.mark.parametrize("change", [float("nan"), 0.006, -0.006])
def test_no_number_and_a_change_either_way_break_a_bound(change: float) -> None:
    outcome = Outcome(1.5, 23.0, 376, change, "rounding", "cpu", change, 0.005, 300)
    assert len(broken({"one": outcome, "other": replace(outcome, against_like=0.004)})) == 1


def test_whatever_a_path_is_to_be_like_comes_before_it() -> None:
    names = list(PATHS)
    assert all(names.index(path.like) <= i for i, path in enumerate(PATHS.values()))


def test_the_committed_run_kept_every_promise_there_is() -> None:
    files = (Path(bench.__file__).parent / "results").glob("quality-*.json")
    runs = [report["paths"] for report in (json.loads(file.read_text()) for file in files) if "paths" in report]
    assert runs
    for paths in runs:
        assert {name: (one["promise"], one["like"], one["bound"]) for name, one in paths.items()} == {
            name: (path.promise, path.like, path.bound) for name, path in PATHS.items()
        }
        assert broken({name: Outcome(**one) for name, one in paths.items()}) == []
