"""Simulations in virtual time: what they promise of every report, on a small shape and on shipped ones."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from fiddler.cost.model import LANES
from fiddler.errors import ConfigError
from fiddler.lab.machine import Machine
from fiddler.lab.shape import ModelShape
from fiddler.lab.simulation import Bound, Report, Setting, simulate
from fiddler.lab.synthetic import SyntheticRouting
from fiddler.lab.systems import System
from fiddler.recording import Recording
from fiddler.trace import Decision, Trace
from tests.support.covering import covering

SMALL = ModelShape(
    name="small",
    n_layers=6,
    n_dense_layers=1,
    dense_intermediate=4096,
    hidden=1024,
    expert_intermediate=1024,
    n_experts=16,
    top_k=4,
    n_heads=16,
    n_kv_heads=4,
    head_dim=64,
    vocab=32000,
)
DESKTOP = Machine.load("rtx4090-desktop")
PLANNERS = ("auto", "all-cpu", "all-fetch")


def setting(**changes: Any) -> Setting:
    """A setting, or its system, with changes; nothing is copied ahead unless asked for."""
    parts = {f.name: changes.pop(f.name) for f in fields(System) if f.name in changes}
    system = System(**{"prefetch": "off", **parts})
    return Setting(**{"shape": SMALL, "machine": DESKTOP, "n_slots": 24, "system": system, **changes})


def text(
    n: int = 1, *, prompt: int = 20, new: int = 24, shape: ModelShape = SMALL, seed: int = 0
) -> list[Recording]:
    made = SyntheticRouting(shape.n_layers, shape.n_experts, shape.top_k, seed=seed)
    return [Recording(str(i), prompt, made.sequence(i, prompt + new - 1)) for i in range(n)]


def visits(sequences: Sequence[Recording]) -> int:
    """Loads of decoding, one sequence alone: every token visits its experts by itself."""
    return sum(recording.experts[recording.n_prompt :].size for recording in sequences)


@pytest.mark.parametrize("policy", ["aged-lfu", "lru", "hybrimoe"])
def test_the_same_run_gives_the_same_report(policy: str) -> None:
    one, two = (simulate(setting(policy=policy), text(2), trace=Trace()) for _ in range(2))

    assert one == two
    assert one.trace is not None
    assert two.trace is not None
    assert one.trace.spans == two.trace.spans
    assert simulate(setting(policy=policy), text(2, seed=1)) != one


@pytest.mark.parametrize(
    ("planner", "n", "machine"), covering(PLANNERS, [1, 3], ["rtx4090-desktop", "fiddler-env1", "h100-server"])
)
def test_makespans_are_as_predicted_where_lanes_start_idle(planner: str, n: int, machine: str) -> None:
    trace = Trace()
    report = simulate(
        setting(planner=planner, waves="one", promote=False, machine=Machine.load(machine)), text(n), trace=trace
    )

    assert report.prediction_error < 1e-6
    for decision in trace.decisions:
        if n_copies(trace, decision) == decision.n_fetch:  # the cache may refuse what a plan would fetch
            assert decision.measured_s == pytest.approx(decision.predicted_s, rel=1e-6)


def n_copies(trace: Trace, decision: Decision) -> int:
    """Copies made while a layer ran."""
    end_s = decision.at_s + decision.measured_s
    return sum(s.lane == "link" and decision.at_s <= s.start_s and s.end_s <= end_s for s in trace.spans)


@pytest.mark.parametrize(
    ("planner", "waves", "n_slots", "tied"),
    covering(PLANNERS, ["auto", "one", "two"], [0, 4, 24, 96], [False, True]),
)
def test_no_run_is_faster_than_its_bytes_allow(planner: str, waves: Any, n_slots: int, tied: bool) -> None:
    shape = replace(SMALL, tied=True, hidden=256) if tied else SMALL
    report = simulate(
        setting(shape=shape, planner=planner, waves=waves, n_slots=n_slots), text(3, shape=shape, new=9)
    )

    assert 0.0 < report.of_bound <= 1.0 + 1e-9
    assert all(0.0 <= share <= 1.0 + 1e-9 for share in report.utilisation.values())


def test_the_bound_is_the_longest_read() -> None:
    assert Bound(1.0, 3.0, 2.0).seconds == 3.0


def test_the_dense_part_bounds_a_run_without_misses() -> None:
    """With every expert in a slot the GPU reads all there is, and nothing else takes time.

    What is missing is one layer's dense part a step, which stands for what follows the last layer's experts.
    """
    roomy = replace(DESKTOP, gpu_expert_launch_s=0.0, dense_launch_s=0.0, host_layer_s=0.0)
    warm = setting(machine=roomy, n_slots=96, planner="all-fetch", promote=False)
    report = simulate(warm, text(prompt=200, new=40))

    assert report.n_hits == visits(text(prompt=200, new=40))
    assert report.utilisation["gpu"] == pytest.approx(1.0)
    assert report.of_bound > 0.999


def test_more_slots_mean_no_fewer_hits() -> None:
    hits = [simulate(setting(n_slots=n), text(new=40)).n_hits for n in (0, 6, 12, 24, 48, 96)]

    assert hits == sorted(hits)
    assert hits[0] == 0
    assert hits[-1] > 0.5 * visits(text(new=40))


@pytest.mark.parametrize("machine", ["rtx4090-desktop", "fiddler-env1", "laptop-4060"])
def test_planning_is_no_slower_on_average_than_the_cpu_alone(machine: str) -> None:
    def seconds(planner: str) -> float:
        placed = setting(planner=planner, machine=Machine.load(machine), waves="one")
        return float(np.mean([simulate(placed, text(n, seed=seed)).decode_s for seed in range(3) for n in (1, 3)]))

    assert seconds("auto") <= seconds("all-cpu")


def test_every_load_is_counted_once_and_its_bytes_where_it_ran() -> None:
    sequences = text()
    report = simulate(setting(promote=False), sequences)
    nbytes = SMALL.expert_bytes

    assert report.n_hits + report.n_cpu + report.n_fetches == visits(sequences)
    assert report.read_bytes == {
        "cpu": report.n_cpu * nbytes,
        "gpu": (report.n_hits + report.n_fetches) * nbytes,
        "link": report.n_fetches * nbytes,
    }
    assert report.n_promotions == 0


def test_promotions_use_a_link_that_is_idle() -> None:
    report = simulate(setting(planner="all-cpu"), text(new=40))

    assert report.n_fetches == 0
    assert report.n_promotions > 0
    assert report.read_bytes["link"] == report.n_promotions * SMALL.expert_bytes


def test_without_slots_everything_runs_on_the_cpu() -> None:
    report = simulate(setting(n_slots=0), text())

    assert report.n_cpu == visits(text())
    assert report.utilisation["link"] == 0.0


def test_a_prompt_longer_than_a_chunk_is_run_in_several_steps() -> None:
    whole, cut = (simulate(setting(chunk_tokens=n, waves="one"), text(prompt=100)) for n in (100, 16))

    assert cut.first_token_s > whole.first_token_s
    assert cut.n_decoded == whole.n_decoded == 23
    assert cut.n_steps == whole.n_steps == 23


def test_sequences_of_any_lengths_are_run_to_their_ends() -> None:
    made = SyntheticRouting(SMALL.n_layers, SMALL.n_experts, SMALL.top_k)
    lengths = [(1, 1), (5, 3), (70, 40), (30, 30)]
    sequences = [Recording(str(i), n, made.sequence(i, n + new)) for i, (n, new) in enumerate(lengths)]

    trace = Trace()
    report = simulate(setting(chunk_tokens=16), sequences, trace=trace)

    rows = sum(d.n_rows for d in trace.decisions)
    assert rows == sum(prompt + new for prompt, new in lengths) * SMALL.n_layers * SMALL.top_k
    assert 0 < report.n_decoded <= sum(new for _, new in lengths)
    ended_s = report.preload_s + report.first_token_s + report.decode_s
    assert ended_s == pytest.approx(max(span.end_s for span in trace.spans))


def test_sequences_together_are_faster_than_one_by_one() -> None:
    together = simulate(setting(), text(4))
    apart = [simulate(setting(), [sequence]) for sequence in text(4)]

    assert together.n_decoded == sum(report.n_decoded for report in apart)
    assert together.tokens_per_s > max(report.tokens_per_s for report in apart)


@pytest.mark.parametrize("n", [2, 3])
def test_two_waves_run_where_they_are_asked_for(n: int) -> None:
    one, two = (simulate(setting(waves=waves), text(n)) for waves in ("one", "two"))

    assert (one.n_steps_in_two_waves, two.n_steps_in_two_waves) == (0, two.n_steps)
    assert one.n_decoded == two.n_decoded


def test_a_single_token_leaves_nothing_to_decode() -> None:
    report = simulate(setting(), text(new=1))

    assert report.first_token_s > 0.0
    assert (report.decode_s, report.n_decoded, report.tokens_per_s, report.of_bound) == (0.0, 0, 0.0, 0.0)


def test_nothing_takes_no_time() -> None:
    assert simulate(setting(), []).first_token_s == 0.0


def test_a_report_as_json_has_all_but_the_trace() -> None:
    report: Report = simulate(setting(), text(), trace=Trace())
    value = report.as_json()

    assert "trace" not in value
    assert value["tokens_per_s"] == report.tokens_per_s
    assert set(value["utilisation"]) == set(value["read_bytes_per_token"]) == set(LANES)
    assert value["bound"]["seconds"] == max(value["bound"][f"{lane}_s"] for lane in LANES)
    assert report.trace is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_slots": -1}, "n_slots"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"waves": "three"}, "auto, one, two"),
    ],
)
def test_an_impossible_setting_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        setting(**changes)


@pytest.mark.parametrize(
    ("changes", "message"), [({"policy": "magic"}, "aged-lfu"), ({"planner": "magic"}, "all-cpu")]
)
def test_an_unknown_name_is_refused_with_the_known_ones(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(setting(**changes), text())


def test_a_routing_of_another_model_is_refused() -> None:
    recording, *_ = text()

    with pytest.raises(ConfigError, match="layers"):
        simulate(setting(), [replace(recording, experts=recording.experts[:, :3])])
    with pytest.raises(ConfigError, match="experts"):
        simulate(setting(), [replace(recording, experts=recording.experts + 16)])
    with pytest.raises(ConfigError, match="prompt"):
        simulate(setting(), [replace(recording, n_prompt=len(recording.experts) + 1)])
