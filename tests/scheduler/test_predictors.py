"""What each predictor expects of a wave's next layer."""

from random import Random

from fiddler.cache.cache import ExpertCache
from fiddler.lab.policies import make_policy
from fiddler.lab.systems import Frequency, LookAhead
from fiddler.scheduler.guesses import MANY, Auto, Predictor, Transitions
from fiddler.scheduler.layer import Layer, Wave
from tests.scheduler.desk import LAYERS, work


def cache(policy: str = "lfu") -> ExpertCache:
    return ExpertCache(4, LAYERS, make_policy(policy, LAYERS))


def ready(wave: int, layer: int, *visited: int, ahead: tuple[tuple[int, int], ...] = ()) -> Layer:
    mine = Wave()
    mine.number = wave
    return Layer(mine, work(layer, dict.fromkeys(visited, 1)), 1, max(1, len(visited)), ahead=ahead)


def names(predictor: Predictor, event: Layer) -> list[int]:
    return [expert for expert, _ in predictor.expects(event)]


def follow(predictor: Predictor, wave: int, *layers: tuple[int, ...]) -> None:
    """Let a wave pass its layers."""
    for layer, visited in enumerate(layers):
        predictor.expects(ready(wave, layer, *visited))


def test_a_look_ahead_is_passed_on_as_it_came() -> None:
    ahead = ((5, 3), (0, 1), (2, 1))
    assert LookAhead().expects(ready(0, 0, 1, ahead=ahead)) == ahead
    assert not LookAhead().expects(ready(0, 0, 1))


# Transitions


def test_where_a_goes_with_b_a_leads_to_b() -> None:
    transitions = Transitions(cache())
    assert not transitions.expects(ready(0, 0, 1)), "nothing is known yet"
    follow(transitions, 1, (1,), (4,), (2,))
    follow(transitions, 2, (0,), (5,), (3,))
    assert transitions.expects(ready(3, 0, 1)) == [(4, 1)]
    assert transitions.expects(ready(3, 1, 5)) == [(3, 1)]
    assert not transitions.expects(ready(3, 2, 3)), "there is no layer after the last"
    assert not transitions.expects(ready(4, 0, 2)), "never seen"


def test_the_most_frequent_comes_first_and_no_more_than_are_visited_now() -> None:
    transitions = Transitions(cache())
    for wave, after in enumerate([(4,), (4,), (4,), (2,), (2,), (5,)]):
        follow(transitions, wave, (1,), after)
    assert names(transitions, ready(9, 0, 1)) == [4]
    assert names(transitions, ready(9, 0, 1, 0)) == [4, 2]
    assert names(transitions, ready(9, 0, 0, 1, 2, 3)) == [4, 2, 5], "and nobody who never came"


def test_a_frequent_expert_does_not_drown_what_the_others_lead_to() -> None:
    transitions = Transitions(cache())
    for wave in range(100):
        follow(transitions, wave, (0,), (wave % 4,))
    for wave in range(100, 105):
        follow(transitions, wave, (1,), (5,))
    assert names(transitions, ready(200, 0, 0, 1))[0] == 5, "always, where the others come every fourth time"


def test_waves_between_each_other_are_kept_apart() -> None:
    transitions = Transitions(cache())
    transitions.expects(ready(0, 0, 1))
    transitions.expects(ready(1, 0, 2))
    transitions.expects(ready(0, 1, 4))
    transitions.expects(ready(1, 1, 5))
    assert names(transitions, ready(2, 0, 1)) == [4]
    assert names(transitions, ready(2, 0, 2)) == [5]


def test_layers_that_do_not_follow_each_other_teach_nothing() -> None:
    transitions = Transitions(cache())
    transitions.expects(ready(0, 0, 1))
    transitions.expects(ready(0, 2, 4))
    transitions.expects(ready(1, 1, 3))
    transitions.expects(ready(1, 0, 3))
    assert not transitions.expects(ready(2, 0, 1))
    assert not transitions.expects(ready(2, 1, 1))
    assert not transitions.expects(ready(3, 1, 3))


def test_waves_that_are_dropped_are_not_kept_for_ever() -> None:
    transitions = Transitions(cache())
    for wave in range(10 * MANY):
        transitions.expects(ready(wave, 0, 1))
        assert len(transitions._latest) <= MANY
    follow(transitions, 10 * MANY, (1,), (4,))
    assert names(transitions, ready(10 * MANY + 1, 0, 1)) == [4], "and it goes on learning"


def test_transitions_learn_the_habits_of_random_text() -> None:
    """Each expert leads to one of the next layer nine times in ten."""
    rng, transitions = Random(0), Transitions(cache())
    n_right = 0
    for wave in range(400):
        first = rng.randrange(LAYERS[0])
        second = (first + 3) % LAYERS[1] if rng.random() < 0.9 else rng.randrange(LAYERS[1])
        n_right += names(transitions, ready(wave, 0, first)) == [second]
        transitions.expects(ready(wave, 1, second))
    assert n_right > 0.85 * 400


# Frequency


def test_frequency_names_the_next_layers_dearest_and_as_many_as_are_visited_now() -> None:
    known = cache()
    for expert, n_rows in ((2, 5), (4, 9), (1, 1)):
        known.observe(1, [(expert, n_rows)], n_rows)
    frequency = Frequency(known)
    assert frequency.expects(ready(0, 0, 3)) == [(4, 1)]
    assert names(frequency, ready(0, 0, 1, 2)) == [4, 2]
    assert names(frequency, ready(0, 0, 0, 1, 2, 3, 4)) == [4, 2, 1], "and nobody who is worth nothing"
    assert not frequency.expects(ready(0, 1, 3)), "nothing is known of layer 2"
    assert not frequency.expects(ready(0, 2, 3)), "there is no layer after the last"


def test_frequency_goes_by_what_the_policy_holds_an_expert_to_be_worth() -> None:
    lru = cache("lru")
    lru.observe(1, [(4, 9)], 9)
    lru.observe(1, [(2, 1)], 1)
    assert names(Frequency(lru), ready(0, 0, 1, 3)) == [2, 4]


# Auto


def test_auto_takes_the_look_ahead_and_falls_back_on_transitions_without_one() -> None:
    auto = Auto(cache())
    assert auto.expects(ready(0, 0, 1, ahead=((3, 2),))) == ((3, 2),)
    follow(auto, 1, (1,), (4,))
    assert names(auto, ready(2, 0, 1)) == [4]
    assert names(auto, ready(3, 0, 1, ahead=((5, 1),))) == [5]
