"""Traces: as Chrome's tracing page and Perfetto read them, and as a picture shows them."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fiddler.cli import timeline
from fiddler.cli.timeline import Window, choose_window
from fiddler.errors import ConfigError
from fiddler.lab.machine import Machine
from fiddler.lab.shape import ModelShape
from fiddler.lab.simulation import Report, Setting, simulate
from fiddler.lab.synthetic import SyntheticRouting
from fiddler.lab.systems import System
from fiddler.recording import Recording
from fiddler.trace import Decision, Span, Trace

ABOUT = {"title": "a model on a machine", "placement": "as planned", "work": "some"}
REQUIRED = {
    "X": {"name", "cat", "ph", "pid", "tid", "ts", "dur", "args"},
    "i": {"name", "cat", "ph", "pid", "tid", "ts", "s", "args"},
    "M": {"name", "ph", "pid", "tid", "args"},
}
"""Keys by phase. Source: "Trace Event Format", Google, 2016: complete, instant and metadata events."""


def traced(waves: Any = "one", *, n: int = 2, n_slots: int = 48) -> tuple[Trace, Report]:
    shape = ModelShape(
        name="small", n_layers=8, hidden=512, expert_intermediate=1024, n_experts=16, top_k=4,
        n_heads=8, n_kv_heads=8, head_dim=64, vocab=1000,
    )  # fmt: skip
    machine = Machine.load("rtx4090-desktop")
    made = SyntheticRouting(shape.n_layers, shape.n_experts, shape.top_k)
    trace = Trace()
    system = System(waves=waves, prefetch="off")
    setting = Setting(shape=shape, machine=machine, n_slots=n_slots, system=system)
    return trace, simulate(setting, [Recording(str(i), 20, made.sequence(i, 40)) for i in range(n)], trace=trace)


@pytest.fixture(params=["one", "two"])
def run(request: pytest.FixtureRequest) -> tuple[Trace, Report]:
    return traced(request.param)


def events(trace: Trace, phase: str) -> list[dict[str, Any]]:
    value = json.loads(json.dumps(trace.chrome(ABOUT), allow_nan=False))
    return [event for event in value["traceEvents"] if event["ph"] == phase]


def test_every_event_has_the_keys_of_its_phase(run: tuple[Trace, Report]) -> None:
    trace, _ = run
    value = trace.chrome(ABOUT)

    assert set(value) == {"displayTimeUnit", "otherData", "traceEvents"}
    assert value["otherData"] == ABOUT
    assert {event["ph"] for event in value["traceEvents"]} == set(REQUIRED)
    assert all(set(event) == REQUIRED[event["ph"]] for event in value["traceEvents"])
    assert len(events(trace, "X")) == len(trace.spans)
    assert len(events(trace, "i")) == len(trace.decisions)


def test_times_are_microseconds_that_do_not_go_back(run: tuple[Trace, Report]) -> None:
    trace, report = run
    complete = events(trace, "X")

    assert all(event["ts"] >= 0.0 and event["dur"] >= 0.0 for event in complete)
    assert all(event["ts"] >= 0.0 for event in events(trace, "i"))
    end = max(event["ts"] + event["dur"] for event in complete)
    assert end == pytest.approx((report.preload_s + report.first_token_s + report.decode_s) * 1e6)


def test_a_lane_does_one_thing_at_a_time(run: tuple[Trace, Report]) -> None:
    trace, _ = run
    for lane in ("cpu", "gpu", "link"):
        spans = sorted((s for s in trace.spans if s.lane == lane), key=lambda s: (s.start_s, s.end_s))
        assert spans
        assert all(one.end_s <= two.start_s + 1e-12 for one, two in pairwise(spans))


def test_rows_have_the_names_of_their_lanes(run: tuple[Trace, Report]) -> None:
    trace, _ = run
    names = {event["tid"]: event["args"]["name"] for event in events(trace, "M") if event["name"] == "thread_name"}

    assert sorted(names.values()) == ["cpu", "gpu", "link", "plans"]
    assert {event["tid"] for event in events(trace, "X") + events(trace, "i")} == set(names)
    lanes = {"dense": "gpu", "slots": "gpu", "cpu": "cpu", "copy": "link", "promote": "link"}
    for event in events(trace, "X"):
        assert names[event["tid"]] == lanes[event["cat"]]


def test_every_kind_of_job_is_told_apart() -> None:
    trace, report = traced(n=1, n_slots=24)
    kinds = [span.kind for span in trace.spans]

    assert set(kinds) == {"dense", "slots", "cpu", "copy", "promote"}
    assert kinds.count("promote") >= report.n_promotions


def test_a_decision_says_what_was_predicted_and_what_came() -> None:
    trace, _ = traced()
    event = events(trace, "i")[0]

    assert {"predicted_s", "measured_s", "n_cpu", "n_gpu", "n_fetch"} <= set(event["args"])


def test_a_trace_keeps_no_more_than_its_limit() -> None:
    trace = Trace(limit=1)
    for at in (0.0, 1.0):
        trace.span(Span("gpu", "dense", 0, None, at, at + 1.0, 1.0))
        trace.decision(Decision(at, 0, 0, 1, 1, 0, 0, 1.0, 1.0))

    assert [span.start_s for span in trace.spans] == [d.at_s for d in trace.decisions] == [0.0]


def test_an_empty_trace_is_a_valid_one() -> None:
    assert [event["ph"] for event in Trace().chrome()["traceEvents"]] == ["M", "M"]


def test_a_window_is_some_layers_of_one_decoding_step(run: tuple[Trace, Report]) -> None:
    trace, report = run
    window = choose_window(trace, report.decodes_from_s)

    assert report.decodes_from_s <= window.start_s < window.end_s <= report.decodes_from_s + report.decode_s
    inside = [d for d in trace.decisions if d.at_s >= window.start_s and d.at_s + d.measured_s <= window.end_s]
    assert timeline.N_LAYERS in {sum(d.wave == wave for d in inside) for wave in {d.wave for d in inside}}


def test_a_window_shows_as_many_kinds_of_jobs_as_it_can() -> None:
    trace, report = traced(n=1)
    window = choose_window(trace, report.decodes_from_s)

    seen = {span.kind for span in trace.spans if window.sees(span.start_s, span.end_s)}
    assert len(seen) >= 4


def test_a_window_can_be_of_any_length() -> None:
    trace, report = traced()

    assert choose_window(trace, report.decodes_from_s, 0.25).length_ms == pytest.approx(250.0)
    assert choose_window(trace, 1e9).end_s > 0.0
    assert choose_window(Trace(), 0.0).length_ms > 0.0


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_is_drawn(run: tuple[Trace, Report], tmp_path: Path, suffix: str) -> None:
    trace, report = run
    file = tmp_path / f"run{suffix}"

    timeline.write(trace, file, ABOUT, from_s=report.decodes_from_s, length_s=None)

    content = file.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert len(content) > 10_000


def test_a_picture_names_its_lanes_layers_and_kinds(tmp_path: Path) -> None:
    from matplotlib import rc_context

    trace, report = traced("two")
    file = tmp_path / "run.svg"
    with rc_context({"svg.fonttype": "none"}):
        timeline.write(trace, file, ABOUT, from_s=report.decodes_from_s, length_s=None)

    drawn = file.read_text()
    for text in (
        "GPU",
        "CPU",
        "link",
        "layer ",
        "experts on the CPU",
        "dense part",
        "milliseconds",
        ABOUT["title"],
    ):
        assert text in drawn
    assert "second wave" in drawn


def test_a_picture_of_nothing_is_drawn_too(tmp_path: Path) -> None:
    timeline.write(Trace(), tmp_path / "run.png", ABOUT, from_s=0.0, length_s=None)

    assert (tmp_path / "run.png").is_file()


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"\.json"):
        timeline.check(tmp_path / "run.txt")
    with pytest.raises(ConfigError, match="no folder"):
        timeline.check(tmp_path / "none" / "run.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        timeline.write(Trace(), tmp_path / "folder.json", ABOUT, from_s=0.0, length_s=None)
    timeline.check(tmp_path / "run.png")
    monkeypatch.setattr(timeline, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"fiddler-moe\[plot\]"):
        timeline.check(tmp_path / "run.png")


def test_a_window_clips_what_is_partly_outside() -> None:
    window = Window(1.0, 2.0)

    assert window.clip_ms(0.5, 1.5) == pytest.approx((0.0, 500.0))
    assert window.clip_ms(1.5, 9.0) == pytest.approx((500.0, 1000.0))
    assert not window.sees(0.0, 1.0)
