"""The law of the calibration: what a window of steps shows, and the rate that follows from it."""

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch

from fastforward_optim import Calibration
from fastforward_optim.calibration import Phase, Rate, as_law
from fastforward_optim.calibration.law import (
    Verdict,
    after_probe,
    after_return,
    after_window,
    begin,
    factor,
    held,
    judge,
    judge_elsewhere,
    next_window,
    random_walk_cosine,
    reach,
    seen,
    with_best,
    with_scatter,
)

LAW = Calibration()
LENGTHS = (20, 26, 34)
STEP, TOTAL = 100, 500
WALK = random_walk_cosine(*LENGTHS, 0.9)
# The cosine at which a rate is just right, and takes none of the limits.
RIGHT = WALK - LAW.slope * math.log(LAW.excess)


def searching(rate=0.01, probed=0.01, **more):
    """A rate in the search that the probe agrees with."""
    options = {"probed_variance": 0.25, "peak": rate, "window": 34, "since": 34, **more}
    return Rate(Phase.SEARCH, 1.0, rate, probed=probed, **options)


def after(rate, cosine, law=LAW, verdict=Verdict.SOUND):
    return after_window(rate, law, verdict, cosine, LENGTHS, 0.9, STEP, TOTAL)


# The constants.


@pytest.mark.parametrize("name", [field.name for field in fields(Calibration)])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "1", None], ids=str)
def test_each_constant_has_to_be_a_positive_number(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a positive number, got "):
        Calibration(**{name: value})


@pytest.mark.parametrize("name", ["probe", "phase", "longest_check", "cut", "horizon_of_mean"])
def test_parts_of_something_are_at_most_all_of_it(name):
    assert getattr(Calibration(**{name: 1}), name) == 1
    with pytest.raises(ValueError, match=f"^{name} must be at most 1, got 1.5"):
        Calibration(**{name: 1.5})


def test_windows_do_not_shrink():
    assert Calibration(growth=1).growth == 1
    with pytest.raises(ValueError, match=r"^growth must be at least 1, got 0\.9"):
        Calibration(growth=0.9)


def test_calibrate_lr_is_true_false_or_the_constants():
    assert as_law(True) == Calibration()
    assert as_law(False) is None
    assert as_law(law := Calibration(phase=0.3)) is law
    for value in (1, None, "yes", 0.5):
        with pytest.raises(TypeError, match="must be True, False or a Calibration, got "):
            as_law(value)


# A random walk.


def simulated(first, second, third, momentum, walks=40_000):
    """The cosine of the mean's movements over many random walks, and its standard error."""
    generator = torch.Generator().manual_seed(first)
    memory = 100 if momentum else 0
    steps = torch.randn(
        memory + first + second + third, walks, generator=generator, dtype=torch.float64
    )
    for before, step in pairwise(steps):
        step.mul_(1 - momentum).add_(before, alpha=momentum)
    means = [part.mean(0) for part in steps.cumsum(0)[memory:].split([first, second, third])]
    one, two = means[1] - means[0], means[2] - means[1]
    products = one * two / math.sqrt(float((one**2).mean() * (two**2).mean()))
    return float(products.mean()), float(products.std()) / math.sqrt(walks)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("lengths", [(6, 7, 9), (12, 12, 12), (40, 20, 60)], ids=str)
def test_the_cosine_of_a_random_walk_is_that_of_a_simulated_one(lengths, momentum):
    mean, error = simulated(*lengths, momentum)
    assert random_walk_cosine(*lengths, momentum) == pytest.approx(mean, abs=4 * error)


def test_without_momentum_it_is_a_quarter_for_equal_windows():
    assert random_walk_cosine(400, 400, 400, 0.0) == pytest.approx(0.25, abs=1e-4)
    assert random_walk_cosine(12, 12, 12, 0.9) == pytest.approx(0.57, abs=0.01)
    assert random_walk_cosine(2000, 2000, 2000, 0.9) == pytest.approx(0.25, abs=0.01)


# After a window.


def test_a_walk_that_goes_on_raises_the_rate_and_one_that_turns_back_cuts_it():
    rates = [after(searching(), RIGHT + more).rate for more in (-0.3, -0.1, 0.0, 0.1, 0.3)]
    assert rates == sorted(rates)
    assert rates[1] < 0.0099 < 0.0101 < rates[3]
    assert rates[2] == pytest.approx(0.01)


@pytest.mark.parametrize("cosine", [None, math.nan, math.inf])
def test_where_there_is_no_cosine_the_rate_stays(cosine):
    rate = searching()
    found = after(rate, cosine)
    assert found == next_window(rate, LAW, STEP, TOTAL)
    assert found.rate == rate.rate


def test_where_both_agree_the_rate_is_what_they_say():
    rate = after(searching(0.005, 0.02), RIGHT + LAW.slope * math.log(4))
    assert rate.moving == pytest.approx(0.02)
    assert rate.rate == pytest.approx(0.02)


def test_the_probe_and_the_movements_count_by_their_variances():
    """A weighted mean of the logarithms: the surer one has more weight."""
    law = replace(LAW, noise=0.3, movement_doubt=0.4)
    cosine = RIGHT + law.slope * math.log(2)
    for variance in (0.01, 0.25, 4.0, 100.0):
        found = after(searching(0.01, 0.01, probed_variance=variance), cosine, law)
        assert found.moving == pytest.approx(0.02)
        assert found.moving_variance == pytest.approx(0.09)
        weight = 1 / 0.25 / (1 / variance + 1 / 0.25)
        assert found.rate == pytest.approx(0.01 * 2**weight)


def test_cosines_that_agree_make_it_surer_and_a_single_one_counts_less_then():
    rate = searching()
    variances = []
    for _ in range(6):
        rate = after(rate, RIGHT + LAW.slope * math.log(0.01 / rate.rate))
        variances.append(rate.moving_variance)
    assert variances == sorted(variances, reverse=True)
    assert variances[-1] < variances[0] / 2
    moved = [math.log(after(start, RIGHT + 0.1).moving / 0.01) for start in (searching(), rate)]
    assert 0 < moved[1] < 0.7 * moved[0]


def confirmed():
    """Where many cosines have said that the rate is just right."""
    return searching(moving=0.01, moving_variance=0.01)


def test_a_rate_that_is_far_too_low_is_seen_at_once_in_a_sound_run():
    cosine = WALK + LAW.saturated + 0.1
    slow, fast = (after(confirmed(), cosine, verdict=v) for v in (Verdict.DOUBTFUL, Verdict.SOUND))
    assert slow.moving < 0.5 * fast.moving
    assert fast.moving == pytest.approx(0.01 * math.exp((cosine - RIGHT) / LAW.slope))


def test_while_the_loss_seems_to_rise_the_rate_is_not_raised():
    assert after(searching(), 0.95, verdict=Verdict.DOUBTFUL).rate == 0.01
    assert after(searching(), 0.95).rate > 0.015
    doubtful = after(searching(), -0.5, verdict=Verdict.DOUBTFUL)
    assert doubtful.rate == after(searching(), -0.5).rate < 0.01


def test_one_window_changes_the_rate_within_limits():
    sure = replace(LAW, movement_doubt=1e-3, noise=1e-3, slope=0.02)
    assert after(searching(), 0.99, sure).rate == pytest.approx(0.01 * LAW.change_at_most)
    assert after(searching(), -0.99, sure).rate == pytest.approx(0.01 / LAW.change_at_most)


def test_the_rate_never_exceeds_its_ceiling():
    assert after(searching(ceiling=0.011), 0.95).rate == 0.011
    assert after(searching(ceiling=0.011), -0.5).rate < 0.01


# After the probe, and after a blow-up.


def test_the_probe_suggests_a_rate_that_goes_twice_as_far_in_as_many_steps():
    """Six steps at 1e-4 each, and the loss is lowest sixty such steps away."""
    rate = begin(LAW, 6)._replace(travelled=6e-4)
    found = after_probe(rate, LAW, 6, 60.0, 400, 10.0)
    assert found.probed == pytest.approx(2 * 1e-3)
    deviation = math.sqrt(found.probed_variance)
    assert found.rate == pytest.approx(found.probed * math.exp(-LAW.caution * deviation))
    assert 0.7 < found.rate / found.probed < 1, "carefully, at first"
    assert (found.phase, found.travelled, found.window) == (Phase.SEARCH, 0.0, LAW.first_window)
    assert after_probe(rate, LAW, 6, 60.0, 4000, 10.0).window == 20


def test_a_probe_whose_loss_has_hardly_fallen_is_believed_less():
    doubts = [
        after_probe(Rate(travelled=1.0), LAW, 6, 9.0, None, certainty).probed_variance
        for certainty in (0.0, 1.0, 4.0, 100.0)
    ]
    assert doubts[0] == doubts[1] > doubts[2] > doubts[3]
    assert doubts[3] == pytest.approx(LAW.probe_doubt**2, rel=0.01)


def test_after_a_blow_up_the_rate_is_cut_and_does_not_rise_above_that_again():
    cut = 0.01 * LAW.cut
    rate = after_return(confirmed(), LAW, STEP, TOTAL)
    assert rate.rate == rate.ceiling == rate.probed == cut
    assert math.isinf(rate.moving_variance), "what the mean said was wrong"
    assert rate.window <= 34
    for _ in range(5):
        rate = after(rate, 0.95)
        assert rate.rate <= cut
    again = after_return(rate, LAW, STEP, TOTAL)
    assert again.ceiling == pytest.approx(rate.rate * LAW.cut**2), "to the same mean: further down"
    better = with_best(again)
    assert (better.since, better.returns) == (0, 1)
    third = after_return(better, LAW, STEP, TOTAL)
    assert third.ceiling == pytest.approx(better.rate * LAW.cut**2)


@pytest.mark.parametrize(
    ("after", "error", "verdict"),
    [
        (math.nan, 0.01, Verdict.WORSE),
        (math.inf, None, Verdict.WORSE),
        (2.1, 0.01, Verdict.WORSE),
        (2.1, 0.04, Verdict.SUSPECT),  # not clearly
        (2.21, 0.3, Verdict.SUSPECT),  # by a tenth, of which the rows say nothing
        (2.1, 0.11, Verdict.SOUND),
        (2.015, 0.001, Verdict.DOUBTFUL),  # clearly, but by less than a hundredth
        (2.005, 0.01, Verdict.SOUND),
        (1.9, 0.01, Verdict.SOUND),
        (2.1, None, Verdict.WORSE),
        (2.01, None, Verdict.SOUND),
        (2.1, math.inf, Verdict.WORSE),
        (1.9, None, Verdict.SOUND),
    ],
)
def test_a_run_has_blown_up_where_the_loss_clearly_rises(after, error, verdict):
    assert judge(searching(), LAW, 2.0, after, error) == verdict


def test_rows_whose_losses_scatter_far_more_than_before_are_a_reason_to_look_elsewhere():
    """For the rate and the steps since the best mean, as in a random walk."""
    before = searching(since=16)
    rate = with_scatter(before, 2.0, 2.0, 0.01)

    def suspect(rate, after, error):
        return judge(rate, LAW, 2.0, after, error) == Verdict.SUSPECT

    error = 0.011 * LAW.scattered
    assert suspect(rate, 2.005, error)
    assert not suspect(rate, 2.005, 0.9 * 0.01 * LAW.scattered)
    assert not suspect(rate, 1.999, error), "the loss has not risen"
    assert not suspect(before, 2.005, error), "nothing to compare with"
    assert not suspect(rate._replace(since=64), 2.005, error), "more steps"
    assert not suspect(rate._replace(rate=0.02), 2.005, error), "a higher rate"
    calmer = after_return(rate, LAW, STEP, TOTAL)._replace(since=16)
    assert calmer.scatter * reach(calmer) == pytest.approx(rate.scatter * reach(rate))


def test_a_loss_that_rises_by_a_tenth_has_risen_whatever_is_usual():
    rate = with_scatter(searching(since=16), 2.0, 1.0, None)
    assert judge(rate, LAW, 2.0, 2.19, None) == Verdict.SUSPECT
    assert judge(rate, LAW, 2.0, 2.21, None) == Verdict.WORSE


def test_where_the_error_is_not_known_the_usual_difference_stands_in_for_it():
    start = searching(since=16)
    rate = with_scatter(start, 2.04, 2.0, None)
    assert rate == with_scatter(start, 2.04, 2.0, math.inf)
    assert rate.scatter == pytest.approx(with_scatter(start, 2.0, 1.9, 0.04).scatter)
    for rise, verdict in ((0.01, Verdict.SOUND), (0.1, Verdict.SUSPECT), (0.17, Verdict.WORSE)):
        assert judge(rate, LAW, 2.0, 2.0 + rise, None) == verdict


def test_what_other_examples_have_not_shown_is_looked_at_again_once_it_is_clearly_more():
    rate = searching(suspected=0.1)
    assert judge(rate, LAW, 2.0, 2.11, 0.04) == Verdict.DOUBTFUL
    assert judge(rate, LAW, 2.0, 2.13, 0.04) == Verdict.SUSPECT
    assert with_best(rate).suspected == 0.0


@pytest.mark.parametrize(
    ("rises", "error", "verdict"),
    [
        ([0.1], 0.01, Verdict.SUSPECT),  # one set is none
        ([0.1, 0.1], 0.05, Verdict.WORSE),
        ([0.1, 0.1], 0.06, Verdict.SUSPECT),
        ([0.1, 0.1, 0.1], 0.06, Verdict.WORSE),
        ([0.1, -0.11], 0.01, Verdict.DOUBTFUL),
        ([0.1, 0.1], 0.15, Verdict.DOUBTFUL),
        ([0.009, 0.009], 0.001, Verdict.SUSPECT),  # half of a hundredth is too little
        ([0.011, 0.011], 0.001, Verdict.WORSE),
        ([0.1, 0.11, 0.09, 0.1], math.inf, Verdict.WORSE),
        ([0.1, 0.5, 0.0, 0.2], math.inf, Verdict.SUSPECT),
        ([0.1, 0.5, -0.3, 0.2], math.inf, Verdict.DOUBTFUL),
        ([math.nan], math.inf, Verdict.WORSE),
        ([0.1, math.inf], 0.01, Verdict.WORSE),
    ],
)
def test_other_examples_confirm_a_rise_or_do_not(rises, error, verdict):
    n = len(rises)
    after = [2.0 + rise for rise in rises]
    assert judge_elsewhere(LAW, [2.0] * n, after, [error] * n) == verdict
    if n > 1:
        assert judge_elsewhere(LAW, [2.0, math.nan], after[:2], [error] * 2) == Verdict.DOUBTFUL
    if verdict == Verdict.SUSPECT:
        last = judge_elsewhere(LAW, [2.0] * n, after, [error] * n, last=True)
        assert last == (Verdict.WORSE if rises == [0.1] else Verdict.DOUBTFUL)


@pytest.mark.parametrize("difference", [0.0, math.nan, math.inf])
def test_a_window_without_a_difference_leaves_what_is_known(difference):
    rate = with_scatter(searching(), 2.0, 2.0, 0.01)
    assert with_scatter(rate, 2.0, 2.0 + difference, None).scatter == rate.scatter
    assert with_scatter(rate._replace(rate=0.0), 2.0, 2.0, 0.01).scatter == rate.scatter


def test_what_rows_scatter_by_is_a_mean_over_recent_windows():
    rate = with_scatter(searching(since=16), 2.0, 2.0, 0.01)
    assert rate.scatter == pytest.approx(0.01 / reach(rate))
    assert with_scatter(rate, 2.0, 2.0, 0.07).scatter == pytest.approx(0.05 / reach(rate))


# When there are windows, and when the rate is held.


def test_windows_grow_in_the_search_and_are_a_part_of_the_run_then():
    rate, windows = searching(window=6), []
    for _ in range(8):
        windows.append(rate.window)
        rate = next_window(rate, LAW, STEP, 2000)
    assert windows == [6, 7, 9, 11, 14, 18, 23, 29]
    rate = rate._replace(phase=Phase.HOLD)
    for _ in range(9):
        rate = next_window(rate, LAW, STEP, 2000)
        assert rate.window >= LAW.shortest_check
    assert rate.window == LAW.longest_check * 2000
    assert next_window(rate._replace(window=300), LAW, STEP, 400).window == LAW.shortest_check
    longer = next_window(searching(window=100), replace(LAW, growth=1), STEP, 2000)
    assert longer.window == 101, "always a step more"


@pytest.mark.parametrize(("step", "window"), [(10, 24), (480, 24), (1000, 50)])
def test_without_a_known_end_windows_are_a_part_of_the_steps_so_far(step, window):
    assert next_window(searching(window=500), LAW, step, None).window == window


@pytest.mark.parametrize("warmup", [0, 100])
def test_the_rate_is_held_once_the_phase_is_over(warmup):
    last = warmup + LAW.phase * 2000
    for step, phase in ((last - 71, Phase.SEARCH), (last - 69, Phase.HOLD), (last, Phase.HOLD)):
        assert held(searching(window=100), LAW, int(step), warmup, 2000).phase == phase
    assert held(searching(window=10), LAW, 50, 0, 100).phase == Phase.SEARCH, "60 steps at least"
    assert held(searching(window=20), LAW, 50, 0, 100).phase == Phase.HOLD


def test_it_is_never_held_where_nobody_knows_how_long_the_run_is():
    assert held(searching(), LAW, 10**6, 0, None).phase == Phase.SEARCH


def test_the_probe_is_not_cut_short_by_the_phase():
    assert held(begin(LAW, 6), LAW, 10**6, 0, 10).phase == Phase.PROBE


# What a step is multiplied by.


def applied(rate, lrs, warmup=0):
    """The rates that steps are taken at, as the schedule sets ``lrs``."""
    found = []
    for step, lr in enumerate(lrs, 1):
        scale = factor(rate, lr, step, warmup)
        found.append(scale * lr)
        rate = seen(rate, lr, scale)
    return found


def test_without_a_warm_up_the_highest_rate_of_the_schedule_becomes_the_calibrated_one():
    rate = searching(0.02, peak=0.0)
    assert applied(rate, [1e-3, 8e-4, 4e-4]) == pytest.approx([0.02, 0.016, 0.008])


@pytest.mark.parametrize("schedule", [[1e-3] * 8, [k * 1e-5 for k in range(1, 9)]], ids=str)
def test_in_a_warm_up_the_rate_rises_in_a_straight_line_whatever_the_schedule_does(schedule):
    found = applied(searching(0.02, peak=0.0), schedule, warmup=8)
    assert found == pytest.approx([0.02 * step / 8 for step in range(1, 9)])


def test_after_a_warm_up_the_schedule_has_the_rate():
    schedule = [1e-3 * min(step / 4, 1.5 - step / 8) for step in range(1, 12)]
    found = applied(searching(0.02, peak=0.0), schedule, warmup=4)
    assert found == pytest.approx([20 * lr for lr in schedule])


def test_the_steps_of_the_probe_are_of_one_length_in_a_warm_up_too():
    """Otherwise the first ones would be so small that they are lost in rounding."""
    schedule = [1e-3 * step / 100 for step in range(1, 7)]
    found = applied(begin(LAW, 6), schedule, warmup=100)
    assert found == pytest.approx([1e-3 / 64] * 6)
    assert applied(begin(LAW, 6), [1e-3] * 6) == pytest.approx([1e-3 / 64] * 6)


@pytest.mark.parametrize("lr", [0.0, -1e-20, math.nan])
def test_a_rate_of_zero_is_no_peak_and_its_multiplier_is_the_schedules(lr):
    """As at the end of a decay."""
    rate = searching(0.02, peak=1e-3)
    assert factor(rate, lr, 5, 0) == pytest.approx(20)
    assert seen(rate, lr, 1.0).peak == 1e-3
    assert factor(searching(peak=0.0), lr, 5, 0) == 1.0
    assert factor(begin(LAW, 6), lr, 1, 0) == LAW.probe


def test_what_steps_have_travelled_is_the_sum_of_their_rates():
    rate = begin(LAW, 6)
    for lr in (1e-3, 2e-3, 0.0):
        rate = seen(rate, lr, 0.5)
    assert rate.travelled == pytest.approx(1.5e-3)
    assert rate.peak == 2e-3
