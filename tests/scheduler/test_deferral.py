"""Which visits join a layer late: each token's lightest, whoever else visits the same experts."""

from hypothesis import given
from hypothesis import strategies as st

from fiddler.scheduler.routing import LayerWork, defer, route

N_EXPERTS = 8


def late(work: LayerWork) -> set[int]:
    """Return the deferred positions of the flattened routing."""
    return {position for load in work.deferred for position in work.order[load.start : load.stop]}


def test_the_lightest_visits_are_deferred() -> None:
    experts = [0, 1, 2, 3, 3, 2, 1, 0]
    weights = [0.4, 0.1, 0.3, 0.2, 0.1, 0.2, 0.3, 0.4]
    assert late(defer(route(0, experts, N_EXPERTS, weights), weights, 4, 1)) == {1, 4}
    assert late(defer(route(0, experts, N_EXPERTS, weights), weights, 4, 2)) == {1, 3, 4, 5}


@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.integers(0, 7))
def test_no_token_keeps_a_visit_lighter_than_one_it_defers(
    data: st.DataObject, n_tokens: int, top_k: int, n_deferred: int
) -> None:
    choices = st.lists(st.integers(0, N_EXPERTS - 1), min_size=top_k, max_size=top_k, unique=True)
    experts = [expert for _ in range(n_tokens) for expert in data.draw(choices)]
    weights = data.draw(st.lists(st.floats(0.01, 1.0), min_size=len(experts), max_size=len(experts)))
    deferred = late(defer(route(0, experts, N_EXPERTS, weights), weights, top_k, n_deferred))
    for token in range(n_tokens):
        mine = set(range(token * top_k, (token + 1) * top_k))
        now = mine - deferred
        assert len(mine & deferred) == min(n_deferred, top_k - 1)
        assert max((weights[p] for p in mine & deferred), default=0.0) <= min(weights[p] for p in now)
