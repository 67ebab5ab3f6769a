"""The trials that a line search makes, one by one, as its description says."""

import inspect

import pytest

from fastforward_optim import BracketSearch, RepeatSearch

from .test_line_search import FUNCTIONS, parabola, run


def path(search, function, last_tau=0.0):
    return [tau for tau, _ in run(search, function, last_tau)[1]]


def rising(tau):
    return 3.0 + tau


def distance(minimum):
    """A loss with a kink, which no parabola fits: each vertex is a guess."""
    return lambda tau: 20 + abs(tau - minimum)


@pytest.mark.parametrize("last_tau", [0.0, 150.0])
@pytest.mark.parametrize("kind", [RepeatSearch, BracketSearch])
def test_a_smaller_budget_ends_a_search_earlier_and_changes_nothing_before(kind, last_tau):
    for name, function in FUNCTIONS.items():
        whole = path(kind(max_trials=20), function, last_tau)
        for budget in range(2, 9):
            assert path(kind(max_trials=budget), function, last_tau) == whole[:budget], name


@pytest.mark.parametrize("kind", [RepeatSearch, BracketSearch])
def test_the_smallest_limits_are_one_repeat_and_one_trial(kind):
    assert run(kind(max_tau=1), distance(9))[0] == 1
    assert path(kind(max_trials=2), distance(9)) == [0, 1]


@pytest.mark.parametrize("search", [RepeatSearch(), BracketSearch()])
def test_a_search_can_be_called_without_a_last_tau(search):
    assert search(FUNCTIONS["parabola, near"]) == run(search, FUNCTIONS["parabola, near"])[0]
    assert inspect.signature(search).parameters["last_tau"].default == 0.0


# RepeatSearch.


def test_repeat_search_stops_where_a_visible_decrease_has_been_lost_again():
    assert path(RepeatSearch(), parabola(1)) == [0, 1, 2]


def test_repeat_searchs_stride_grows_eightfold_on_a_plateau():
    def plateau(tau):
        return 3.0 if tau <= 1 else 3 - 1e-5 * tau if tau <= 40 else 4.0

    assert path(RepeatSearch(max_tau=600), lambda tau: 3.0) == [0, 1, 8, 64, 512]
    assert path(RepeatSearch(), plateau) == [0, 1, 8, 16, 24, 32, 40, 48]


# BracketSearch.


@pytest.mark.parametrize(
    ("last_tau", "first"), [(0, 1), (2, 1), (4, 1), (4.5, 2.25), (100, 50), (1e9, 10000)]
)
def test_bracket_search_starts_at_half_of_the_last_tau_or_at_one(last_tau, first):
    assert path(BracketSearch(), rising, last_tau)[:2] == [0, first]


@pytest.mark.parametrize(
    ("last_tau", "taus"), [(128, [0, 64, 16, 4, 1]), (16, [0, 8, 2, 1]), (5, [0, 2.5, 1])]
)
def test_bracket_search_comes_down_by_quarters_until_it_is_at_one(last_tau, taus):
    assert path(BracketSearch(), rising, last_tau) == taus


def test_bracket_search_comes_down_until_the_loss_is_lower_than_at_the_start():
    assert path(BracketSearch(), parabola(6), 600) == [0, 300, 75, 18.75, 4.6875, 6]
    assert path(BracketSearch(), parabola(8), 128) == [0, 64, 16, 4, 8], "the same is not lower"


def test_bracket_search_goes_up_by_doubling_while_the_slope_flattens_out():
    assert path(BracketSearch(), parabola(5)) == pytest.approx([0, 1, 2, 4, 8, 5])


def test_bracket_search_goes_up_fourfold_while_the_slope_is_straight():
    taus = path(BracketSearch(max_tau=600), lambda tau: 99 - 0.1 * tau)
    assert taus == [0, 1, 2, 8, 32, 128, 512, 600]


def test_bracket_search_takes_the_same_loss_for_the_end_of_the_decrease():
    assert path(BracketSearch(), distance(5)) == [0, 1, 2, 8, 5]


def test_bracket_search_stops_at_the_cap_if_the_loss_has_not_risen():
    assert path(BracketSearch(max_tau=40), parabola(38)) == [0, 1, 2, 8, 32, 40]


def test_bracket_search_goes_up_eightfold_on_a_plateau():
    assert path(BracketSearch(max_tau=600), lambda tau: 3.0) == [0, 1, 8, 64, 512, 600]


def test_bracket_search_goes_to_the_vertex_in_the_first_bracket_it_meets():
    assert path(BracketSearch(), parabola(1.25)) == pytest.approx([0, 1, 2, 1.25])


@pytest.mark.parametrize(
    ("minimum", "taus"),
    [
        # The bracket (2, 8, 32) has losses 2, 8 and 22 above the kink: curvature 0.0611, vertex at
        # (2 + 8 + 1 / 0.0611) / 2 = 13.18. That is worse than 8, so (2, 8, 13.18) is next.
        (10, [0, 1, 2, 8, 32, 13.182, 9.552]),
        (14, [0, 1, 2, 8, 32, 15, 16.5]),
        (5.5, [0, 1, 2, 8, 16, 6, 5.286]),
    ],
)
def test_bracket_search_takes_two_steps_to_vertices_in_ever_narrower_brackets(minimum, taus):
    assert path(BracketSearch(), distance(minimum)) == pytest.approx(taus, abs=1e-3)


def test_bracket_search_halves_the_way_to_a_loss_that_is_not_finite_twice():
    assert path(BracketSearch(), FUNCTIONS["NaN beyond ten"]) == [0, 1, 2, 8, 32, 20, 14]


def test_bracket_search_takes_a_vertex_for_a_decrease_that_is_visible_in_all():
    """Of 0.1 % of the loss at the start, 3: the first point below it has a fifth of the way."""
    search = BracketSearch(standard_errors=0)
    visible, invisible = (path(search, parabola(10, depth), 152) for depth in (4e-3, 2e-3))
    assert visible == pytest.approx([0, 76, 19, 10])
    assert invisible == [0, 76, 19]
    assert path(BracketSearch(), parabola(10, 4e-3), 152) == [0, 76, 19], "none is clear yet"
