"""Which rows travel in a step: every decoding sequence, and prompts as far as the budget goes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler.scheduler.waves import RowSpan, assemble, halves


@dataclass(eq=False)
class Running:
    """A request as assembling sees it, and the rows that were run for it."""

    n_prompt: int
    n_past: int = 0
    n_wanted: int = 1
    ran: list[int] = field(default_factory=list)
    n_made: int = 0

    @property
    def prefilling(self) -> bool:
        return self.n_past < self.n_prompt

    @property
    def finished(self) -> bool:
        return self.n_made == self.n_wanted

    def run(self, span: RowSpan["Running"]) -> None:
        """Do what a step does to a request: the span's rows become past, its last row makes a token."""
        self.ran += range(span.start, span.stop)
        self.n_past = span.stop
        self.n_made += span.last


@st.composite
def requests(draw: st.DrawFn) -> Running:
    n_prompt = draw(st.integers(1, 40))
    return Running(n_prompt, n_past=draw(st.integers(0, n_prompt + 5)))


several = st.lists(requests(), max_size=6)
budgets = st.integers(1, 50)


@given(several, budgets, st.booleans())
@settings(deadline=None)
def test_every_decoding_sequence_goes_with_one_row(running: list[Running], budget: int, chunked: bool) -> None:
    spans = assemble(running, budget, chunked=chunked)
    decoding = [r for r in running if not r.prefilling]
    assert [s for s in spans if not s.request.prefilling] == [
        RowSpan(r, r.n_past, r.n_past + 1, last=True) for r in decoding
    ]


@given(several, budgets)
@settings(deadline=None)
def test_chunks_together_keep_to_the_budget(running: list[Running], budget: int) -> None:
    spans = [s for s in assemble(running, budget, chunked=True) if s.request.prefilling]
    left = sum(r.n_prompt - r.n_past for r in running if r.prefilling)
    assert sum(s.n_rows for s in spans) == min(budget, left)


@given(several, budgets, st.booleans())
@settings(deadline=None)
def test_the_first_prompt_always_advances(running: list[Running], budget: int, chunked: bool) -> None:
    prompts = [r for r in running if r.prefilling]
    spans = [s for s in assemble(running, budget, chunked=chunked) if s.request.prefilling]
    assert [s.request for s in spans] == prompts[: len(spans)]
    assert all(s.n_rows > 0 for s in spans)
    assert len(spans) >= min(1, len(prompts))


@given(several, budgets)
@settings(deadline=None)
def test_unchunked_prompts_go_whole(running: list[Running], budget: int) -> None:
    spans = [s for s in assemble(running, budget, chunked=False) if s.request.prefilling]
    assert all((s.start, s.stop) == (s.request.n_past, s.request.n_prompt) for s in spans)
    assert all(s.last for s in spans)
    # All but the last of them fit within the budget.
    assert sum(s.n_rows for s in spans[:-1]) < budget


@given(several, budgets, st.booleans())
@settings(deadline=None)
def test_a_token_is_picked_where_a_prompt_ends(running: list[Running], budget: int, chunked: bool) -> None:
    for span in assemble(running, budget, chunked=chunked):
        assert span.last == (span.stop >= span.request.n_prompt)


@given(
    st.lists(st.builds(Running, n_prompt=st.integers(1, 40), n_wanted=st.integers(1, 5)), min_size=1, max_size=6),
    st.integers(1, 20),
    st.booleans(),
)
@settings(deadline=None)
def test_steps_run_every_token_once_in_order_and_finish(waiting: list[Running], budget: int, chunked: bool) -> None:
    everyone, running = list(waiting), []
    n_steps = 0
    while waiting or running:
        running += waiting[:1]  # somebody joins at each step
        waiting = waiting[1:]
        for span in assemble(running, budget, chunked=chunked):
            span.request.run(span)
        running = [r for r in running if not r.finished]
        n_steps += 1
        assert n_steps <= sum(r.n_prompt + r.n_wanted for r in everyone), "some step did nothing"
    for request in everyone:
        assert request.ran == list(range(request.n_prompt + request.n_wanted - 1))
        assert request.n_made == request.n_wanted


def test_prompts_come_after_decoding_and_the_last_is_cut() -> None:
    first, decoding, second = Running(5, n_past=2), Running(4, n_past=6), Running(9)
    spans = assemble([first, decoding, second], 7, chunked=True)
    assert spans == [
        RowSpan(decoding, 6, 7, last=True),
        RowSpan(first, 2, 5, last=True),
        RowSpan(second, 0, 4, last=False),
    ]


@st.composite
def steps(draw: st.DrawFn) -> list[RowSpan[Running]]:
    running = draw(st.lists(requests(), min_size=1, max_size=6))
    return assemble(running, draw(budgets), chunked=draw(st.booleans()))


def rows(spans: Sequence[RowSpan[Running]]) -> dict[int, list[int]]:
    """The rows of each request, in the order they are run."""
    found: dict[int, list[int]] = {}
    for span in spans:
        found.setdefault(id(span.request), []).extend(range(span.start, span.stop))
    return found


@given(steps(), st.booleans())
@settings(deadline=None)
def test_halves_hold_every_row_once_and_in_order(spans: list[RowSpan[Running]], cut: bool) -> None:
    parts = halves(spans, cut=cut)
    assert 1 <= len(parts) <= 2
    assert all(parts)
    assert all(span.n_rows > 0 for part in parts for span in part)
    assert rows([span for part in parts for span in part]) == rows(spans)
    assert list(rows([span for part in parts for span in part])) == [id(span.request) for span in spans]


@given(steps())
@settings(deadline=None)
def test_halves_are_equal_where_a_span_may_be_cut(spans: list[RowSpan[Running]]) -> None:
    sizes = [sum(span.n_rows for span in part) for part in halves(spans, cut=True)]
    assert len(sizes) == min(2, sum(span.n_rows for span in spans))
    assert max(sizes) - min(sizes) <= 1


@given(steps(), st.booleans())
@settings(deadline=None)
def test_only_the_last_span_of_the_first_half_is_cut(spans: list[RowSpan[Running]], cut: bool) -> None:
    first, *later = halves(spans, cut=cut)
    (second,) = later or ([],)
    whole = [span for span in [*first, *second] if span in spans]
    pieces = [span for span in [*first, *second] if span not in spans]
    if not pieces:
        assert whole == spans
        return
    assert cut
    assert pieces == [first[-1], second[0]]
    assert (first[-1].request, first[-1].stop) == (second[0].request, second[0].start)


@given(steps(), st.booleans())
@settings(deadline=None)
def test_a_token_is_picked_once_from_halves(spans: list[RowSpan[Running]], cut: bool) -> None:
    def picked(step: Sequence[RowSpan[Running]]) -> list[tuple[int, int]]:
        return [(id(span.request), span.stop) for span in step if span.last]

    assert picked([span for part in halves(spans, cut=cut) for span in part]) == picked(spans)


def test_halves_by_example() -> None:
    decoding = [Running(4, n_past=4 + i) for i in range(3)]
    prompt = Running(9)
    spans = [*(RowSpan(r, r.n_past, r.n_past + 1, last=True) for r in decoding), RowSpan(prompt, 0, 9, last=True)]
    assert halves(spans, cut=False) == [spans[:3], spans[3:]]
    assert halves(spans, cut=True) == [
        [*spans[:3], RowSpan(prompt, 0, 3, last=False)],
        [RowSpan(prompt, 3, 9, last=True)],
    ]
    assert halves(spans[:1], cut=True) == [spans[:1]]
    assert halves(spans[3:], cut=False) == [spans[3:]]
    assert halves([], cut=True) == []


def test_nobody_running_is_an_empty_step() -> None:
    assert assemble([], 5, chunked=True) == []
