"""What deciding costs: the scripted layer decides as the engine's defaults do, and the report has its schema."""

import json
from pathlib import Path

import pytest

from bench import overhead
from bench import overhead_script as scripted
from fiddler import EngineConfig
from fiddler.lab.systems import System


def test_the_defaults_are_the_engine_s() -> None:
    config, system = EngineConfig(), System()
    names = ("policy", "prefetch", "promote", "planner", "half_life", "waves")
    assert [getattr(system, name) for name in names] == [getattr(config, name) for name in names]


def test_half_the_experts_are_resident_and_guesses_are_copied_ahead() -> None:
    n_steps = scripted.WARM_UP + 8
    found = scripted.layer(System(), 6, n_steps)
    assert found.us.low > 0.0
    assert found.hits + found.on_cpu + found.fetched == pytest.approx(8.0)
    assert found.hits > 2.0
    assert found.ahead > 0.0
    without = scripted.layer(System(policy="aged-lfu", prefetch="off", promote=False), 6, n_steps)
    assert (without.ahead, without.promoted) == (0.0, 0.0)


def test_a_report_has_its_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "overhead.json"
    overhead.main(["--layers", "3", "--steps", "9", "--policy", "lru", "--prefetch", "off", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["system"] == {"policy": "lru", "prefetch": "off", "promote": True}
    assert report["layer"].keys() == overhead.DECIDED.keys()
    assert "a layer by lru, prefetch off" in capsys.readouterr().out
