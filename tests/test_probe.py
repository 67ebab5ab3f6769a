"""The probe's line search: how far the loss falls along the first steps."""

import math
import random

import pytest

from fastforward_optim.calibration.probe import Distance, ProbeSearch, lowest
from fastforward_optim.search.evidence import Loss, Paired, Rows

FIRST = 384.0  # six steps at a 64th of the rate, at the rate that was set


def probed(loss_of, first=FIRST):
    """What the search returned, and its trials."""
    trials = []

    def evaluate(tau):
        trials.append((tau, loss_of(tau)))
        return trials[-1][1]

    best = ProbeSearch(first)(evaluate, 0.0)
    assert trials[0][0] == 0.0, "the start is measured first"
    assert best in dict(trials), "only what was measured is returned"
    assert len({tau for tau, _ in trials}) == len(trials), "nothing is measured twice"
    return best, trials


def parabola(minimum, depth=1.0):
    return lambda tau: 3 + depth * ((tau / minimum - 1) ** 2 - 1)


def noisy(loss_of, error, seed):
    """With noise that is the same for the same tau; the loss knows its standard error."""

    def loss(tau):
        draw = random.Random(f"{seed} {tau!r}").gauss(0, 1) if tau else 0.0
        return Loss(loss_of(tau) + error * draw, error if tau else 0.0)

    return loss


DISTANCES = [0.01, 0.1, 0.9, 3.0, 17.0, 1e3, 3e4, 1e6]
by_distance = pytest.mark.parametrize("distance", DISTANCES)


@pytest.mark.parametrize("first", [1.0, FIRST])
@by_distance
def test_the_minimum_is_found_from_a_hundredth_to_a_million_times_the_first_trial(distance, first):
    minimum = distance * first
    best, trials = probed(parabola(minimum), first)
    assert minimum / 2 <= best <= 2 * minimum
    assert dict(trials)[best] == min(dict(trials).values())
    found = lowest(trials)
    assert found.tau == pytest.approx(minimum, rel=1e-6), "on a parabola it is exact"
    assert found.certainty > 100
    assert len(trials) < 16


def of_rows(minimum, seed, rows=32):
    """Each row has a parabola of its own; the loss knows its paired error. And the true minimum."""
    draw = random.Random(seed)
    depths = [draw.lognormvariate(-0.5, 1.0) for _ in range(rows)]
    minima = [draw.gauss(1.0, 0.7) for _ in range(rows)]

    def measured(tau):
        x = tau / minimum
        losses = (3 + d * ((x - m) ** 2 - m**2) for d, m in zip(depths, minima, strict=True))
        return Rows(tuple(losses), (1.0,) * rows)

    def loss(tau):
        paired = Paired.of(measured(0.0), measured(tau))
        return Loss(3 + paired.difference, paired.error)

    lowest_at = sum(d * m for d, m in zip(depths, minima, strict=True)) / sum(depths)
    return loss, minimum * lowest_at


@by_distance
def test_where_rows_disagree_the_minimum_of_their_mean_is_found(distance):
    for seed in range(5):
        loss, minimum = of_rows(distance * FIRST, seed)
        _, trials = probed(loss)
        found = lowest(trials)
        assert minimum / 6 < found.tau < 1.01 * minimum, "not further, where nearer may be as good"
        assert found.tau > minimum / 2.5 or found.certainty < 3


@pytest.mark.parametrize("distance", DISTANCES[:5])
def test_in_noise_the_minimum_is_found_to_within_a_factor_of_three(distance):
    minimum = distance * FIRST
    for seed in range(5):
        best, trials = probed(noisy(parabola(minimum), 0.1, seed))
        found = lowest(trials)
        assert minimum / 3 < found.tau < 3 * minimum
        assert dict(trials)[best] < 2.5
        assert found.certainty == pytest.approx((3 - min(dict(trials).values())) / 0.1)


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_is_no_certainty(seed):
    """A loss that is flat to within its error, and then rises at a thousand times the first."""
    _, trials = probed(noisy(lambda tau: 3 + (tau / FIRST / 1e3) ** 2, 0.1, seed))
    found = lowest(trials)
    assert found.certainty < 3
    assert found.tau < 1e3 * FIRST


@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("minimum", [0.1, 2.0, 50.0])
def test_losses_that_are_no_numbers_are_no_minimum(minimum, hole):
    """A run that goes too far ends in NaN."""
    whole = parabola(minimum * FIRST)
    best, trials = probed(lambda tau: whole(tau) if tau < 3 * minimum * FIRST else hole)
    assert best <= 2 * minimum * FIRST
    assert minimum / 3 < lowest(trials).tau / FIRST < 3 * minimum


@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf])
def test_where_all_ahead_is_no_number_the_nearest_trial_bounds_the_distance(hole):
    best, trials = probed(lambda tau: hole if tau else 3.0)
    assert best == 0.0
    nearest = min(tau for tau, _ in trials if tau)
    assert nearest <= FIRST / 256
    assert lowest(trials) == Distance(pytest.approx(nearest / 12), 0.0)


def test_where_the_start_is_no_number_there_is_no_distance():
    _, trials = probed(lambda _: math.nan)
    assert lowest(trials) is None
    _, trials = probed(lambda tau: tau if tau else math.inf)
    assert lowest(trials) is None


def test_a_flat_loss_ends_the_search_and_suggests_a_bound():
    best, trials = probed(lambda _: 3.0)
    assert best == 0.0
    assert len(trials) < 12
    assert lowest(trials) == Distance(max(tau for tau, _ in trials) / 12, 0.0)


@pytest.mark.parametrize("chance", [0.0, -0.02])
def test_a_loss_that_never_clearly_rises_suggests_no_distance_of_millions(chance):
    """A model may be as bad at any distance: random labels, attention that has saturated."""

    def loss(tau):
        shift = chance if tau > 1000 * FIRST else 0.01
        return Loss(3 + shift, 0.015) if tau else Loss(3.0, 0.0)

    _, trials = probed(loss)
    assert max(tau for tau, _ in trials) > 1e6 * FIRST
    found = lowest(trials)
    assert found.tau <= FIRST
    assert found.certainty < 1.5
    surely = [(tau, Loss(loss, loss.error / 20)) for tau, loss in trials]
    assert chance == 0 or lowest(surely).tau > 1000 * FIRST


def test_a_loss_that_rises_at_once_suggests_less_than_the_first_trial():
    best, trials = probed(lambda tau: 3.0 + tau)
    assert best == 0.0
    found = lowest(trials)
    assert 0 < found.tau < FIRST / 256
    assert found.certainty == 0.0


@pytest.mark.parametrize("distance", [1e-4, 1e7])
def test_a_minimum_out_of_reach_is_looked_for_up_to_the_limits(distance):
    best, trials = probed(parabola(distance * FIRST))
    ahead = [tau / FIRST for tau, _ in trials if tau]
    assert min(ahead) >= 1 / 4096
    assert max(ahead) <= 64 * 4.0**14
    assert len(trials) < 20
    assert best in (0.0, distance * FIRST) or distance > 1


def test_what_was_leapt_over_is_looked_at():
    """Flat until ten times the first trial, and then a narrow valley."""

    def loss(tau):
        return 3.0 if tau < 3 * FIRST else 3 + ((tau / FIRST / 4 - 1) ** 2 - 1)

    best, trials = probed(loss)
    assert best == 4 * FIRST
    assert lowest(trials).tau == pytest.approx(4 * FIRST, rel=0.3)


# Where the loss is lowest.


def test_lowest_is_the_vertex_of_the_parabola():
    loss = parabola(10.0)
    assert lowest([(tau, loss(tau)) for tau in (0.0, 4.0, 8.0, 16.0)]).tau == pytest.approx(10)
    assert lowest([(tau, loss(tau)) for tau in (16.0, 0.0, 8.0)]).tau == pytest.approx(10)


def test_without_a_trial_beyond_the_best_it_is_the_best():
    assert lowest([(0.0, 3.0), (4.0, 2.0)]).tau == 4.0
    assert lowest([(0.0, 3.0), (4.0, 2.0), (8.0, math.nan)]).tau == 4.0


def test_without_trials_ahead_there_is_none():
    assert lowest([]) is None
    assert lowest([(0.0, 3.0), (-2.0, 1.0)]) is None
    assert lowest([(4.0, 3.0)]) is None, "the start has to be among them"


def test_a_nearer_trial_that_may_be_as_good_draws_it_near():
    """A rate that is too low is soon seen, one that is too high does damage."""
    losses = {0.0: 3.0, 4.0: 2.05, 16.0: 2.0, 64.0: 9.0}
    known = [(tau, Loss(loss, 0.1)) for tau, loss in losses.items()]
    assert lowest(known).tau == pytest.approx(8.0)
    sure = [(tau, Loss(loss, 0.01)) for tau, loss in losses.items()]
    assert lowest(sure).tau > 16
    assert lowest(sure).certainty == pytest.approx(100)


def test_a_decrease_without_a_known_error_is_compared_with_rounding():
    assert lowest([(0.0, 3.0), (4.0, 2.7), (8.0, 9.0)]).certainty == pytest.approx(100)
    unknown = [(0.0, 3.0), (4.0, Loss(2.7, math.inf)), (8.0, 9.0)]
    assert lowest(unknown).certainty == pytest.approx(100)


def test_it_looks_nearer_where_nothing_is_lower_and_all_that_lies_further_on_rises():
    """The first trial is level within its error, as the far side of a valley may be."""

    def evaluate(tau):
        return Loss(4.685 - 1.2e-3 * tau + 3.2e-6 * tau * tau, 0.02 + 5e-4 * tau)

    trials = []

    def recorded(tau):
        trials.append((tau, evaluate(tau)))
        return trials[-1][1]

    assert 90 < ProbeSearch(384.0)(recorded) < 400
    assert 90 < lowest(trials).tau < 400
