"""Every architecture on a GPU whose streams run late: the same tokens, from recorded steps where those can be."""

from pathlib import Path

import pytest

from fiddler.config import EngineConfig
from fiddler.devices.kernels import Kernels
from fiddler.steps import graphs
from tests.architectures import build, included
from tests.engine.test_fake_gpu import close
from tests.engine.test_invariance import ids, uneven
from tests.support.fake_gpu import FakeGpu
from tests.support.placement import Placement, Script, Subject, Visit, run

UNRECORDED = {"muse_spark": "lift_fresh"}
"""Packed, and yet something in its forward cannot be recorded: it makes a tensor from numbers of the host's."""
SCRIPT = Script(
    (
        Visit(ids(10, 1), n_prompt=4, joins=0, leaves=1000),
        Visit(ids(9, 2), n_prompt=3, joins=0, leaves=1000),
    ),
    chunk_tokens=16,
)


@pytest.mark.parametrize("name", included())
def test_an_architecture_gives_the_same_tokens(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LEAST_TOKENS", 4)
    monkeypatch.setattr(graphs.Graphs, "forget", lambda self: None)  # so that there is something to look at
    build(name).save_pretrained(tmp_path)
    model = Subject.open(tmp_path, Kernels())
    plain = run(model, SCRIPT, Placement(EngineConfig(waves="one")))
    config = EngineConfig(device="cuda", slots=model.n_experts // 3, kv_tokens=64, waves="one")
    costs = uneven(len(model.mapped.n_experts), copy_s=1e-5)
    played = run(model, SCRIPT, Placement(config, costs, gpu=FakeGpu(3)))
    assert close(played, plain)
    recorded = played.rig.steps.graphs
    assert (recorded is not None) == model.packed.packed
    if recorded is not None:
        assert UNRECORDED.get(name, "") in recorded.why_not
        assert bool(recorded.why_not) == (name in UNRECORDED)
        assert any(recorded.kinds.values()) == (name not in UNRECORDED)
