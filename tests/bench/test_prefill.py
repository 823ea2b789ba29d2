"""Reading prompts in chunks: what is run, and what the numbers of a cell come from."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import kernels, prefill
from bench.kernels import Ceilings
from bench.prefill import Reading, grid
from bench.report import Spread
from fiddler.lab.shape import ModelShape

SHAPE = ModelShape(
    name="small",
    n_layers=2,
    hidden=4,
    expert_intermediate=5,
    n_experts=3,
    top_k=2,
    n_heads=1,
    n_kv_heads=1,
    head_dim=2,
    vocab=7,
)


def test_a_run_of_the_demo_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prefill.json"
    sizes = ["--lengths", "6,20", "--chunks", "8,16", "--repeats", "2", "--set-mib", "1"]
    prefill.main(["--demo", *sizes, "--calibration-dir", str(tmp_path), "--json", str(file)])
    report: dict[str, Any] = json.loads(file.read_text())
    assert [(cell["n_input"], cell["chunk_tokens"]) for cell in report["cells"]] == [(6, 8), (20, 8), (20, 16)]
    few, many = (cell["expert_bytes"] for cell in report["cells"][:0:-1])
    assert few < many  # each chunk reads its experts
    assert "of_gemm" in capsys.readouterr().out


def test_of_chunks_that_hold_a_whole_prompt_one_is_run_and_a_prompt_fits_the_context() -> None:
    assert list(grid([10, 100, 1000], [50, 20, 400], 101)) == [(10, 20), (100, 50), (100, 20), (100, 400)]


def test_operations_are_two_a_weight_and_row() -> None:
    attention, router, expert, head = 2 * 4 * 2 * (1 + 1), 4 * 3, 3 * 4 * 5, 7 * 4
    assert prefill.flop(SHAPE, 10, 40) == 2 * (2 * 10 * (attention + router) + 40 * expert + head)


def test_rates_are_of_the_median_time_and_shares_of_the_best_pass() -> None:
    best = Ceilings(Spread(1e4, 5e3, 2e4), {"one": Spread(1.0, 1.0, 4.0), "other": Spread(2.0, 2.0, 2.0)})
    readings = [Reading(seconds, 8_000_000_000, 40) for seconds in (4.0, 1.0, 2.0)]
    cell = prefill.cell(SHAPE, best, 10, 5, readings)
    assert (cell["first_token_s"].median, cell["tokens_per_s"], cell["gbs"], cell["of_ceiling"]) == (
        2.0,
        5.0,
        4.0,
        1.0,
    )
    assert cell["of_gemm"] == pytest.approx(prefill.flop(SHAPE, 10, 40) / 2.0 / 2e4)


def test_the_better_of_two_measurements_counts() -> None:
    slow, fast = Spread(1.0, 1.0, 2.0), Spread(1.0, 0.5, 3.0)
    found = Ceilings(slow, {"way": fast}).or_better(Ceilings(fast, {"way": slow}))
    assert found == Ceilings(fast, {"way": fast})


def test_a_large_matmul_is_timed_and_reported(tmp_path: Path) -> None:
    assert kernels.gemm_flop_per_s(1 << 16, 1).low > 0.0
    file = tmp_path / "kernels.json"
    kernels.main(["--shape", "16x8", "--rows", "1", "--passes", "1", "--set-mib", "1", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["gemm_flop_per_s"]["high"] > 0.0
