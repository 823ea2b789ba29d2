"""Recorded routing as visits of layers, and look-aheads made up for it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fiddler.lab.synthetic import SyntheticRouting
from fiddler.recording import RECALL, SPREAD, Recording, count_rows, guesses, visits

SHAPE = (6, 16, 4)
"""Layers, experts, and experts a token."""


def routing(n_tokens: int, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> NDArray[np.int16]:
    return SyntheticRouting(*shape, seed=seed).sequence(0, n_tokens)


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    """A few tokens of three layers; some visit fewer experts than others, or none."""
    n_tokens = draw(st.integers(0, 9))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    experts = random.permuted(np.tile(np.arange(-2, 4), (n_tokens, 3, 1)), axis=2)[..., :3]
    return Recording("drawn", draw(st.integers(0, n_tokens)), np.maximum(experts, -1).astype(np.int16))


# Visits


@given(st.lists(recordings(), max_size=3), st.integers(1, 5))
def test_every_token_passes_every_layer_once_and_every_visit_is_counted(
    sequences: list[Recording], chunk_tokens: int
) -> None:
    tokens: Counter[int] = Counter()
    rows: Counter[tuple[int, int]] = Counter()
    for layer, loads, n_tokens in visits(sequences, chunk_tokens):
        tokens[layer] += n_tokens
        rows.update({(layer, expert): n for expert, n in loads})
    everything = [sequence.experts for sequence in sequences]
    assert all(tokens[layer] == sum(map(len, everything)) for layer in range(3))
    assert rows == Counter(
        (layer, int(expert))
        for experts in everything
        for layer in range(3)
        for expert in experts[:, layer].ravel()
        if expert >= 0
    )


@given(recordings(), st.integers(1, 5))
def test_prompts_come_in_chunks_and_then_one_token_a_step(recording: Recording, chunk_tokens: int) -> None:
    steps = [n_tokens for layer, _, n_tokens in visits([recording], chunk_tokens) if layer == 0]
    whole, rest = divmod(recording.n_prompt, chunk_tokens)
    n_made = len(recording.experts) - recording.n_prompt
    assert steps == [chunk_tokens] * whole + [rest] * (rest > 0) + [1] * n_made


def test_a_step_passes_its_layers_in_order_and_sequences_come_one_after_the_other() -> None:
    sequences = [Recording("a", 2, routing(3)), Recording("b", 1, routing(2, seed=1))]
    seen = list(visits(sequences))
    assert [layer for layer, _, _ in seen] == list(range(6)) * 4
    assert [n_tokens for layer, _, n_tokens in seen if layer == 0] == [2, 1, 1, 1]
    assert seen[-1][1] == count_rows(sequences[1].experts[1:, 5])


def test_a_layers_visits_are_counted_by_expert_without_those_to_nobody() -> None:
    assert count_rows(np.array([[3, -1], [0, 3]], np.int16)) == ((0, 1), (3, 2))
    assert count_rows(np.array([[-1, -1]], np.int16)) == ()


# Look-aheads made up


def share(experts: NDArray[np.int16], ahead: NDArray[np.int16]) -> NDArray[np.float64]:
    """Return how often the guess at each place came true, beyond the first layer."""
    true = (ahead[..., :, None] == experts[..., None, :]).any(axis=-1)[:, 1:]
    return np.asarray(true.mean(axis=(0, 1)))


@pytest.mark.parametrize("recall", [0.0, 0.1, 0.5, RECALL, 0.95, 1.0])
@pytest.mark.parametrize("shape", [SHAPE, (6, 16, 1), (6, 16, 2)])
def test_the_share_of_guesses_that_come_true_is_the_one_asked_for(
    recall: float, shape: tuple[int, int, int]
) -> None:
    experts = routing(2000, shape)
    assert share(experts, guesses(experts, recall)).mean() == pytest.approx(recall, abs=0.01)


def test_the_first_guess_comes_true_more_often_than_the_last() -> None:
    experts = routing(2000)
    by_place = share(experts, guesses(experts))
    assert list(by_place) == sorted(by_place, reverse=True)
    assert by_place[0] - by_place[-1] == pytest.approx(2 * SPREAD, abs=0.03)


@given(st.integers(0, 2**16), st.floats(0.0, 1.0), st.integers(1, 12))
def test_no_guess_names_an_expert_twice_and_a_wrong_one_names_none_that_is_visited(
    seed: int, recall: float, n_tokens: int
) -> None:
    experts = routing(n_tokens, (3, 6, 3), seed)
    ahead = guesses(experts, recall, seed)
    assert ahead.shape == experts.shape
    assert (ahead[:, 0] == -1).all(), "nothing comes before the first layer"
    others = [set(experts[:, layer].ravel().tolist()) for layer in range(3)]
    for token, layer in np.ndindex(n_tokens, 3):
        named = [expert for expert in ahead[token, layer].tolist() if expert >= 0]
        assert len(named) == len(set(named))
        assert set(named) <= others[layer], "as popular as those that are visited"


def test_a_certain_look_ahead_names_what_is_visited_and_a_hopeless_one_does_not() -> None:
    experts = routing(50)
    certain, hopeless = guesses(experts, 1.0), guesses(experts, 0.0)
    assert (np.sort(certain[:, 1:]) == np.sort(experts[:, 1:])).all()
    assert share(experts, hopeless).max() == 0.0


def test_guesses_are_the_same_for_the_same_seed_only() -> None:
    experts = routing(50)
    assert (guesses(experts, seed=3) == guesses(experts, seed=3)).all()
    assert (guesses(experts, seed=3) != guesses(experts, seed=4)).any()


def test_there_are_no_guesses_for_no_tokens() -> None:
    assert guesses(routing(0)).shape == (0, 6, 4)
