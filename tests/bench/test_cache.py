"""The bench of cache policies runs, and its summaries say what its cells do."""

import json
from pathlib import Path
from statistics import mean, median

import pytest

from bench import cache
from fiddler.lab.policies import POLICIES
from fiddler.lab.replay import BOUNDS

QUICK = ["--tokens", "6", "--sequences", "1", "--processes", "0"]


def test_every_policy_on_a_made_up_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cache.json"
    cache.main([*QUICK, "--traces", "mixtral-8x7b, tuning", "--json", str(file)])
    report = json.loads(file.read_text())
    policies = {*BOUNDS, *POLICIES, cache.PROFILED}
    assert {cell["policy"] for cell in report["cells"]} == policies
    assert {cell["resident"] for cell in report["cells"]} == set(cache.SHARES)
    for policy in policies:
        ratios = [cell["ratio"] for cell in report["cells"] if cell["policy"] == policy]
        groups = [summary for summary in report["summary"] if summary["policy"] == policy]
        assert [group["traces"] for group in groups] == ["all", "made up, tuning"]
        for group in groups:
            assert (group["mean"], group["median"], group["worst"]) == (mean(ratios), median(ratios), max(ratios))
    assert report["summary"][0] == {"policy": "belady", "traces": "all", "mean": 1.0, "median": 1.0, "worst": 1.0}
    assert "Reads beside Belady's" in capsys.readouterr().out


@pytest.mark.skipif(not cache.DEMO.is_file(), reason="the demo's routing is not here")
def test_the_halves_of_the_demo_share_no_domain() -> None:
    settings = cache.Settings(tokens=1, sequences=1, half_life=32.0)
    (tuning, other), (held_out, _) = (cache.read(name, settings) for name in cache.HALVES)
    domains = [{r.name.partition("/")[0] for r in trace.recordings} for trace in (tuning, held_out)]
    assert len(domains[0]) == len(domains[1])
    assert not domains[0] & domains[1]
    assert [r.name for r in other] == [r.name for r in held_out.recordings]
